// One mapped shard file: checked when opened, its blocks when first touched.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "file.hpp"
#include "format.hpp"
#include "huffman.hpp"

namespace negfast {

// Where the two streams of a row lie, in bytes from the start of the file.
struct RowStreams {
  uint64_t block;
  uint64_t events;
  uint64_t item_begin, item_end;
  uint64_t time_begin, time_end;
};

class ShardFile {
 public:
  // Throws ShardError for anything but a whole, undamaged shard of a known version: every byte outside
  // the blocks is covered by a checksum that is verified here.
  explicit ShardFile(const std::string& path);

  const std::string& path() const { return path_; }
  const Header& header() const { return header_; }
  const uint8_t* data() const { return map_.data(); }
  uint64_t size() const { return map_.size(); }
  uint64_t blocks() const { return (header_.rows + kBlockUsers - 1) / kBlockUsers; }

  std::optional<uint64_t> row_of(uint32_t user) const;
  uint64_t events_of(uint64_t row) const;
  RowStreams streams(uint64_t row) const;
  uint64_t block_bytes(uint64_t block, bool times) const;

  // Verifies the block's checksum unless that was done before. Throws ShardError.
  void check_items(uint64_t block) const;
  void check_times(uint64_t block) const;

  // Indexed by rank and then padded with kNoItem up to every rank that a symbol can express.
  static constexpr uint32_t kNoItem = 0x80000000;
  const uint32_t* item_of_rank() const { return item_of_rank_.data(); }
  size_t expressible_ranks() const { return item_of_rank_.size(); }

  const DecodeTable& item_table() const { return items_; }
  const DecodeTable& delta_table() const { return deltas_; }
  const DecodeTable& run_table() const { return runs_; }

  [[noreturn]] void damaged(const std::string& what) const;

 private:
  void check_header();
  std::span<const uint8_t> section(const Section& section, const char* name) const;
  template <class Record>
  std::span<const Record> records(const Section& section, const char* name, uint64_t count) const;
  void read_codes(std::span<const uint8_t> bytes);
  void read_ranks(std::span<const uint8_t> bytes);
  void check_users() const;
  void check_index() const;
  const WideIndex& wide(const BlockIndex& block) const;

  std::string path_;
  MappedFile map_;
  Header header_{};
  std::span<const uint32_t> users_;
  std::span<const BlockIndex> index_;
  std::span<const WideIndex> wide_;
  std::vector<uint32_t> item_of_rank_;
  DecodeTable items_, deltas_, runs_;
  // One byte a block and stream, set once verified; two threads may both verify, which is harmless.
  std::unique_ptr<std::atomic<uint8_t>[]> items_checked_, times_checked_;
};

}  // namespace negfast
