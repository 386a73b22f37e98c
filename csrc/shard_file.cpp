#include "shard_file.hpp"

#include <algorithm>
#include <cstring>

#include "bits.hpp"
#include "crc32c.hpp"
#include "symbols.hpp"

namespace negfast {
namespace {

std::string found_expected(const std::string& what, uint64_t found, uint64_t expected) {
  return what + ": found " + std::to_string(found) + ", expected " + std::to_string(expected);
}

}  // namespace

ShardFile::ShardFile(const std::string& path) : path_(path), map_(path) {
  check_header();
  read_codes(section(header_.codes, "code lengths"));
  read_ranks(section(header_.ranks, "ranks"));
  const bool sparse = header_.features & kSparseUsers;
  users_ = records<uint32_t>(header_.user_list, "user list", sparse ? header_.rows : 0);
  index_ = records<BlockIndex>(header_.index, "index", blocks());
  wide_ = records<WideIndex>(header_.wide, "wide index", header_.wide.size / sizeof(WideIndex));
  check_users();
  check_index();
  items_checked_ = std::make_unique<std::atomic<uint8_t>[]>(blocks());
  times_checked_ = std::make_unique<std::atomic<uint8_t>[]>(blocks());
}

void ShardFile::damaged(const std::string& what) const { throw ShardError(path_ + ": damaged shard: " + what); }

void ShardFile::check_header() {
  if (map_.size() < sizeof(Header)) damaged(found_expected("bytes", map_.size(), sizeof(Header)) + " or more");
  std::memcpy(&header_, map_.data(), sizeof(Header));
  if (std::memcmp(header_.magic, kMagic, sizeof kMagic) != 0)
    throw ShardError(path_ + ": found another kind of file, expected a negfast shard");
  if (header_.version != kVersion)
    throw ShardError(path_ + ": " + found_expected("shard version", header_.version, kVersion));
  if (header_.features & ~kKnownFeatures)
    throw ShardError(path_ + ": found unknown feature bits " + std::to_string(header_.features & ~kKnownFeatures) +
                     ", expected none: the shard needs a newer negfast");
  if (crc32c(&header_, offsetof(Header, crc)) != header_.crc) damaged("the header's checksum does not match");
  if (header_.file_size != map_.size()) damaged(found_expected("bytes", map_.size(), header_.file_size));
  if (header_.items >= kMaxItems || header_.ranked > header_.items || header_.rows > header_.users ||
      header_.users >> 31 || header_.time_unit == 0 || (header_.events > 0 && header_.ranked == 0))
    damaged("the header's numbers contradict each other");
  const int64_t farthest = kFarthest / header_.time_unit + 1;
  if (header_.time_base < -farthest || header_.time_base > header_.time_last || header_.time_last > farthest)
    damaged("the header's times contradict each other");
  for (unsigned bits : {header_.item_head_bits, header_.time_head_bits, header_.run_head_bits})
    if (bits < 1 || bits > 16) damaged(found_expected("head bits", bits, 1) + " to 16");
}

std::span<const uint8_t> ShardFile::section(const Section& s, const char* name) const {
  if (s.offset > map_.size() || s.size > map_.size() - s.offset) damaged(std::string(name) + ": beyond the file's end");
  if (crc32c(map_.data() + s.offset, s.size) != s.crc) damaged(std::string(name) + ": the checksum does not match");
  return {map_.data() + s.offset, s.size};
}

// A section of fixed-size records, mapped in place. The zeros that align it are part of it: they come
// first where the section follows the blocks (index), last elsewhere (user list).
template <class Record>
std::span<const Record> ShardFile::records(const Section& s, const char* name, uint64_t count) const {
  const auto bytes = section(s, name);
  const uint64_t before = -s.offset % 8;
  const uint64_t after = s.size < before ? 0 : -(count * sizeof(Record)) % 8;
  if (s.size != before + count * sizeof(Record) + after)
    damaged(found_expected(std::string(name) + " bytes", s.size, before + count * sizeof(Record) + after));
  return {reinterpret_cast<const Record*>(bytes.data() + before), count};
}

void ShardFile::read_codes(std::span<const uint8_t> bytes) {
  auto next = [&] {
    if (bytes.size() < 2) damaged("code lengths: too short");
    const size_t n = bytes[0] | bytes[1] << 8;
    if (bytes.size() - 2 < n) damaged("code lengths: too short");
    const auto lengths = bytes.subspan(2, n);
    bytes = bytes.subspan(2 + n);
    return lengths;
  };
  auto table = [&](unsigned value_bits, unsigned head_bits, unsigned tags) {
    const auto lengths = next();
    const size_t expected = size_t{symbol_count(static_cast<int>(value_bits), head_bits)} * tags;
    if (!lengths.empty() && lengths.size() != expected)
      damaged(found_expected("symbols of an alphabet", lengths.size(), expected));
    DecodeTable t = decode_table(lengths, head_bits, tags);
    if (t.max_bits == 0 && header_.events > 0 && tags > 1) damaged("code lengths: no item has a code");
    return t;
  };
  items_ = table(bits_for(header_.ranked), header_.item_head_bits, feedbacks_of(header_.features));
  deltas_ = table(kTimeBits, header_.time_head_bits, 1);
  runs_ = table(kTimeBits, header_.run_head_bits, 1);
  const bool runs = header_.features & kTimeRuns;
  if (header_.events > 0 && (deltas_.max_bits == 0 || (runs && runs_.max_bits == 0)))
    damaged("code lengths: no time has a code");
}

void ShardFile::read_ranks(std::span<const uint8_t> bytes) {
  const int width = bits_for(header_.items);
  const uint64_t expected = (header_.ranked * width + 63) / 64 * 8;
  if (bytes.size() != expected) damaged(found_expected("rank bytes", bytes.size(), expected));
  const int rank_bits = std::max<int>(bits_for(header_.ranked), header_.item_head_bits);
  item_of_rank_.assign(size_t{1} << rank_bits, kNoItem);
  unpack_bits(bytes.data(), bytes.size(), width, item_of_rank_.data(), header_.ranked);
  for (uint64_t rank = 0; rank < header_.ranked; ++rank)
    if (item_of_rank_[rank] >= header_.items)
      damaged(found_expected("item of a rank", item_of_rank_[rank], header_.items - 1) + " at most");
}

void ShardFile::check_users() const {
  if (!(header_.features & kSparseUsers) && header_.rows != header_.users)
    damaged(found_expected("rows without a user list", header_.rows, header_.users));
  for (size_t i = 0; i < users_.size(); ++i)
    if (users_[i] >= header_.users || (i > 0 && users_[i] <= users_[i - 1])) damaged("the user list is not increasing");
}

// Every stream lies between the tables and the index, and no row claims more events than its bits allow:
// what a reader allocates is bounded by the size of the file.
void ShardFile::check_index() const {
  const uint64_t begin = header_.user_list.offset + header_.user_list.size, end = header_.index.offset;
  uint64_t events = 0;
  for (const BlockIndex& block : index_) {
    auto check = [&](const auto* event, const auto* item, const auto* time) {
      bool good = event[0] == 0 && item[0] == 0 && time[0] == 0;
      for (uint32_t k = 0; k < kBlockUsers; ++k) {
        good &= event[k] <= event[k + 1] && item[k] <= item[k + 1] && time[k] <= time[k + 1];
        good &= uint64_t{event[k + 1]} - event[k] <= 8 * (uint64_t{item[k + 1]} - item[k]);
      }
      good &= block.first_event == events;
      auto inside = [&](uint64_t offset, uint64_t size) {
        return begin <= offset && offset <= end && size <= end - offset;
      };
      good &= inside(block.item_offset, item[kBlockUsers]) && inside(block.time_offset, time[kBlockUsers]);
      if (!good) damaged("block " + std::to_string(&block - index_.data()) + " of the index contradicts itself");
      events += event[kBlockUsers];
    };
    if (block.wide) {
      const WideIndex& w = wide(block);
      check(w.event, w.item, w.time);
    } else {
      check(block.event, block.item, block.time);
    }
  }
  if (events != header_.events) damaged(found_expected("events", events, header_.events));
}

const WideIndex& ShardFile::wide(const BlockIndex& block) const {
  uint64_t position;
  std::memcpy(&position, block.event, sizeof position);
  if (position >= wide_.size()) damaged("a block beyond the wide index");
  return wide_[position];
}

std::optional<uint64_t> ShardFile::row_of(uint32_t user) const {
  if (!(header_.features & kSparseUsers)) return user < header_.rows ? std::optional<uint64_t>(user) : std::nullopt;
  const auto found = std::lower_bound(users_.begin(), users_.end(), user);
  if (found == users_.end() || *found != user) return std::nullopt;
  return static_cast<uint64_t>(found - users_.begin());
}

uint64_t ShardFile::events_of(uint64_t row) const {
  const BlockIndex& block = index_[row / kBlockUsers];
  const uint64_t k = row % kBlockUsers;
  if (block.wide) return wide(block).event[k + 1] - wide(block).event[k];
  return block.event[k + 1] - block.event[k];
}

RowStreams ShardFile::streams(uint64_t row) const {
  const BlockIndex& block = index_[row / kBlockUsers];
  const uint64_t k = row % kBlockUsers;
  auto make = [&](const auto* event, const auto* item, const auto* time) {
    return RowStreams{row / kBlockUsers,
                      static_cast<uint64_t>(event[k + 1] - event[k]),
                      block.item_offset + item[k],
                      block.item_offset + item[k + 1],
                      block.time_offset + time[k],
                      block.time_offset + time[k + 1]};
  };
  if (block.wide) return make(wide(block).event, wide(block).item, wide(block).time);
  return make(block.event, block.item, block.time);
}

uint64_t ShardFile::block_bytes(uint64_t b, bool times) const {
  const BlockIndex& block = index_[b];
  if (block.wide) return times ? wide(block).time[kBlockUsers] : wide(block).item[kBlockUsers];
  return times ? block.time[kBlockUsers] : block.item[kBlockUsers];
}

void ShardFile::check_items(uint64_t block) const {
  if (items_checked_[block].load(std::memory_order_relaxed)) return;
  if (crc32c(data() + index_[block].item_offset, block_bytes(block, false)) != index_[block].item_crc)
    damaged("items of block " + std::to_string(block) + ": the checksum does not match");
  items_checked_[block].store(1, std::memory_order_relaxed);
}

void ShardFile::check_times(uint64_t block) const {
  if (times_checked_[block].load(std::memory_order_relaxed)) return;
  if (crc32c(data() + index_[block].time_offset, block_bytes(block, true)) != index_[block].time_crc)
    damaged("times of block " + std::to_string(block) + ": the checksum does not match");
  times_checked_[block].store(1, std::memory_order_relaxed);
}

}  // namespace negfast
