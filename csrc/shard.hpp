// A data set's histories: a base file and the files appended to it, read as one.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "decode.hpp"
#include "shard_file.hpp"

namespace negfast {

class Shard {
 public:
  // Later files hold later events of a user.
  explicit Shard(const std::vector<std::string>& paths);
  Shard(const Shard&) = delete;
  Shard& operator=(const Shard&) = delete;

  uint64_t users() const { return users_; }
  uint64_t items() const { return items_; }
  uint64_t events() const { return events_; }
  const std::vector<std::unique_ptr<ShardFile>>& files() const { return files_; }

  // Throws ShardError for a user out of range.
  uint64_t events_of(int32_t user) const;

  // Where every user's history starts in an output of all of them: offsets[0] = 0 .. offsets[users.size()].
  void offsets(std::span<const int32_t> users, int64_t* offsets) const;

  // Histories of the users, one after another as `offsets` says; a null column is left out.
  // Checksums are verified before a block's first byte is used.
  void read(std::span<const int32_t> users, const int64_t* offsets, int32_t* item, uint8_t* feedback, int64_t* time,
            unsigned threads) const;

  // Every event's row of an item table of `row_bytes` a row: histories as tokens, times never touched.
  void read_rows(std::span<const int32_t> users, const int64_t* offsets, const uint8_t* table, size_t row_bytes,
                 uint8_t* out, unsigned threads) const;

  // The histories of a few users, on the calling thread; positions in the columns start at offsets[0].
  void read_chunk(std::span<const int32_t> users, const int64_t* offsets, int32_t* item, uint8_t* feedback,
                  int64_t* time) const;

 private:
  enum class Stream { items, times };

  // Calls decode(file, jobs) with the users' streams in every file, their blocks verified.
  template <class Decode>
  void for_each_file(std::span<const int32_t> users, const int64_t* offsets, Stream stream, Decode&& decode) const;

  std::vector<std::unique_ptr<ShardFile>> files_;
  uint64_t users_ = 0, items_ = 0, events_ = 0;
};

}  // namespace negfast
