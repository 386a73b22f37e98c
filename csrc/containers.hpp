// What feature state is kept in: the last few of many, states by number, rows by pair.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "portable_math.hpp"

namespace negfast {

// The last rows that were added, at most `most`.
template <class T, size_t most>
class Last {
 public:
  void add(const T& row) {
    if (kept_.size() == most) {
      kept_[made_ % most] = row;
    } else {
      if (kept_.size() == kept_.capacity()) kept_.reserve(std::min(most, kept_.size() + kept_.size() / 4 + 4));
      kept_.push_back(row);
    }
    ++made_;
  }
  size_t size() const { return kept_.size(); }
  // Number k of those kept, the oldest first.
  NEGFAST_INLINE const T& operator[](size_t k) const { return kept_[(made_ - kept_.size() + k) % most]; }
  size_t bytes() const { return kept_.capacity() * sizeof(T); }

 private:
  std::vector<T> kept_;
  uint64_t made_ = 0;
};

// States of those of N numbers that have one, in blocks that do not move.
template <class T>
class States {
 public:
  void grow(size_t more) { place_.resize(place_.size() + more, kNone); }
  size_t size() const { return place_.size(); }
  NEGFAST_INLINE T* find(int32_t number) {
    const uint32_t at = place_[number];
    return at == kNone ? nullptr : &blocks_[at / kBlock][at % kBlock];
  }
  T& make(int32_t number, const T& first) {
    if (made_ % kBlock == 0) blocks_.push_back(std::make_unique<T[]>(kBlock));
    place_[number] = static_cast<uint32_t>(made_++);
    return *find(number) = first;
  }
  size_t bytes() const { return place_.capacity() * sizeof(uint32_t) + blocks_.size() * kBlock * sizeof(T); }
  template <class Number>
  size_t sum(const Number& of) const {
    size_t total = 0;
    for (size_t k = 0; k < made_; ++k) total += of(blocks_[k / kBlock][k % kBlock]);
    return total;
  }

 private:
  static constexpr uint32_t kNone = ~uint32_t{0};
  static constexpr size_t kBlock = 256;
  std::vector<uint32_t> place_;
  std::vector<std::unique_ptr<T[]>> blocks_;
  size_t made_ = 0;
};

// A hash table from a pair of numbers below 2^31 to a row of `Payload`, by linear probing. The key's two highest bits
// are the caller's.
template <class Payload>
class Table {
 public:
  static constexpr uint64_t kKey = ~uint64_t{0} >> 2;

  NEGFAST_INLINE static uint64_t key(int32_t a, int32_t b) {
    return static_cast<uint64_t>(a) << 31 | static_cast<uint64_t>(b);
  }
  // The row of a key, or where it would be.
  NEGFAST_INLINE size_t place(uint64_t key) const {
    size_t at = first(key);
    while (keys[at] != kEmpty && (keys[at] & kKey) != key) at = at + 1 == keys.size() ? 0 : at + 1;
    return at;
  }
  NEGFAST_INLINE bool is_empty(size_t at) const { return keys[at] == kEmpty; }
  // The row of a key, made if there is none.
  NEGFAST_INLINE size_t make(uint64_t key) {
    if (4 * (held_ + 1) > 3 * keys.size()) grow();
    const size_t at = place(key);
    if (is_empty(at)) {
      keys[at] = key;
      ++held_;
    }
    return at;
  }
  NEGFAST_INLINE void fetch_early(uint64_t key) const {
    const size_t at = first(key);
    __builtin_prefetch(&keys[at], 1);
    if (!rows.empty()) __builtin_prefetch(&rows[at], 1);
  }
  size_t bytes() const { return keys.capacity() * sizeof(uint64_t) + rows.capacity() * sizeof(Payload); }

  explicit Table(bool has_rows) : keys(kLeast, kEmpty), rows(has_rows ? kLeast : 0) {}

  std::vector<uint64_t> keys;
  std::vector<Payload> rows;  // empty, or one a key

 private:
  static constexpr uint64_t kEmpty = ~uint64_t{0};
  static constexpr size_t kLeast = 1024;

  // Where the search for a key begins: ascending with its hash, so that a table grows in order.
  NEGFAST_INLINE size_t first(uint64_t key) const {
    return static_cast<size_t>(static_cast<unsigned __int128>(mixed(key)) * keys.size() >> 64);
  }

  void grow() {
    const size_t size = keys.size() + keys.size() / 2;
    Table more(!rows.empty());
    more.keys.assign(size, kEmpty);
    if (!rows.empty()) more.rows.resize(size);
    for (size_t at = 0; at < keys.size(); ++at) {
      if (is_empty(at)) continue;
      const size_t to = more.place(keys[at] & kKey);
      more.keys[to] = keys[at];
      if (!rows.empty()) more.rows[to] = rows[at];
    }
    keys.swap(more.keys);
    rows.swap(more.rows);
  }

  size_t held_ = 0;
};

}  // namespace negfast
