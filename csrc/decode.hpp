// The decoding loops. A stream is one chain of dependent look-ups, so several users' streams are decoded
// in turns ("lanes"): the processor overlaps their chains, and no user pays for more than one stream.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>

#include "bits.hpp"
#include "shard_file.hpp"

namespace negfast {

// One stream: `events` symbols from byte `begin`, the first of them being number `at` of the output.
struct DecodeJob {
  uint64_t begin, end;  // bytes in the file
  uint64_t events;
  uint64_t at;
};

inline constexpr int kLanes = 3;  // more do not fit the registers, measured slower on Zen 5

namespace detail {

struct Lane {
  uint64_t bit;
  uint64_t at;
  uint64_t left;
  uint64_t state;
  uint64_t end;
};

// `emit(at, value, tag, state)` takes every symbol; `state` is the stream's own running value.
// An unaligned 8-byte load is sure to hold 57 bits: two symbols of at most 28, or of any length as long
// as the first leaves room for the longest; it nearly always does, and the branch is predicted.
inline uint64_t window_at(const uint8_t* data, uint64_t bit) { return load64(data + (bit >> 3)) >> (bit & 7); }

template <class Emit>
inline __attribute__((always_inline)) unsigned symbol(uint64_t window, const DecodeEntry* table, Lane& lane,
                                                      Emit& emit) {
  const DecodeEntry entry = table[window & ((1u << kMaxCodeBits) - 1)];
  const unsigned total = entry & 255;
  const uint64_t extra = low_bits(window, total) >> ((entry >> 8) & 63);
  emit(lane.at, (entry >> 24) + extra, static_cast<uint8_t>(entry >> 16), lane.state);
  lane.bit += total;
  ++lane.at;
  return total;
}

template <class Emit>
inline __attribute__((always_inline)) void two_symbols(const uint8_t* data, const DecodeEntry* table, unsigned spare,
                                                       Lane& lane, Emit& emit) {
  uint64_t window = window_at(data, lane.bit);
  const unsigned total = symbol(window, table, lane, emit);
  window >>= total;
  if (__builtin_expect(total > spare, 0)) window = window_at(data, lane.bit);
  symbol(window, table, lane, emit);
}

// How many events all these lanes can take before one ends or could read beyond the file. The index lies
// behind every stream, so only a stream that lies about its length comes near the file's end.
inline uint64_t common_run(const ShardFile& file, const Lane* lanes, int n) {
  const uint64_t limit = (file.size() - 8) * 8;
  uint64_t run = lanes[0].left;
  for (int k = 0; k < n; ++k) {
    const uint64_t safe = lanes[k].bit > limit ? 0 : (limit - lanes[k].bit) / 64;  // no symbol is longer than 57 bits
    if (safe == 0) file.damaged("a stream runs beyond the end of the file");
    run = std::min({run, lanes[k].left, safe});
  }
  return run;
}

// Lanes and emitter are copied: a store through a byte pointer may alias whatever has an address,
// and would otherwise force all of it to be read again after every event.
template <int kCount, class Emit>
inline void run_lanes(const uint8_t* data, const DecodeTable& decode, Lane* lanes, uint64_t run, Emit& emitter) {
  const DecodeEntry* table = decode.entries.data();
  const unsigned spare = 57 - decode.max_bits;
  Emit emit = emitter;
  Lane local[kCount];
  for (int k = 0; k < kCount; ++k) local[k] = lanes[k];
  for (uint64_t i = 0; i < run / 2; ++i)
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) two_symbols(data, table, spare, local[k], emit);
  if (run % 2 == 1)
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) symbol(window_at(data, local[k].bit), table, local[k], emit);
  for (int k = 0; k < kCount; ++k) {
    lanes[k] = local[k];
    lanes[k].left -= run;
  }
  emitter = emit;
}

}  // namespace detail

// Decodes one stream a job, each a plain sequence of the table's symbols.
template <class Emit>
void decode_streams(const ShardFile& file, const DecodeTable& table, std::span<const DecodeJob> jobs,
                    uint64_t initial_state, Emit& emit) {
  using detail::Lane;
  Lane lanes[kLanes];
  int active = 0;
  size_t next = 0;
  auto refill = [&](int k) {
    while (next < jobs.size() && jobs[next].events == 0) ++next;
    if (next == jobs.size()) return false;
    const DecodeJob& job = jobs[next++];
    lanes[k] = {job.begin * 8, job.at, job.events, initial_state, job.end * 8};
    return true;
  };
  while (active < kLanes && refill(active)) ++active;
  while (active > 0) {
    const uint64_t run = detail::common_run(file, lanes, active);
    if (active == kLanes)
      detail::run_lanes<kLanes>(file.data(), table, lanes, run, emit);
    else
      for (int k = 0; k < active; ++k) detail::run_lanes<1>(file.data(), table, lanes + k, run, emit);
    for (int k = active - 1; k >= 0; --k) {
      if (lanes[k].left > 0) continue;
      if ((lanes[k].bit + 7) / 8 * 8 != lanes[k].end) file.damaged("a stream ends elsewhere than its index says");
      if (!refill(k)) lanes[k] = lanes[--active];
    }
  }
}

// Items and feedbacks, to item[at] and feedback[at].
void decode_items(const ShardFile& file, std::span<const DecodeJob> jobs, int32_t* item, uint8_t* feedback);

// The row of a table that belongs to every item, to out[at * row_bytes].
void decode_rows(const ShardFile& file, std::span<const DecodeJob> jobs, const uint8_t* table, size_t row_bytes,
                 uint8_t* out);

// Times in seconds, to time[at].
void decode_times(const ShardFile& file, std::span<const DecodeJob> jobs, int64_t* time);

}  // namespace negfast
