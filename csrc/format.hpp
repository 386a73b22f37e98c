// The bytes of a shard file, as csrc/FORMAT.md describes them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace negfast {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "shards are read in place: little-endian only");

// What is wrong with a file or with events handed to a writer; Python sees an InputError.
struct ShardError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline constexpr char kMagic[8] = {'N', 'F', 'S', 'H', 'A', 'R', 'D', '\n'};
inline constexpr uint32_t kVersion = 1;

// A reader refuses a file with a bit that it does not know.
enum Feature : uint32_t {
  kSparseUsers = 1,  // the file lists the users it holds; otherwise row r is user r
  kTimeRuns = 2,     // times are (delta, length of the run) pairs; otherwise a delta an event
  kWithdrawals = 4,  // some events take a like or dislike back: four feedbacks instead of three
  kKnownFeatures = kSparseUsers | kTimeRuns | kWithdrawals,
};

inline constexpr uint32_t kBlockUsers = 64;     // unit of checksums and of relative offsets
inline constexpr uint32_t kStripeUsers = 4096;  // item blocks, then time blocks, of so many rows
inline constexpr int kFeedbacks = 4;            // exposed, like, dislike, withdrawn
inline constexpr uint32_t kMaxItems = 1u << 30;
inline constexpr int kTimeBits = 32;            // a shard spans less than 2^32 time units
inline constexpr int64_t kFarthest = int64_t{1} << 53;  // seconds from 1970, so that no arithmetic overflows

struct Section {
  uint64_t offset;
  uint64_t size;
  uint32_t crc;
  uint32_t zero;
};

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t features;
  uint64_t file_size;
  uint64_t rows;       // users with an entry in the index
  uint64_t users;      // size of the user index space; rows <= users
  uint64_t events;
  uint64_t items;      // size of the item index space
  uint64_t ranked;     // items with an event: ranks 0..ranked-1
  int64_t time_base;   // time units since 1970 of the earliest event
  int64_t time_last;   // and of the latest
  uint32_t time_unit;  // seconds
  uint8_t item_head_bits;
  uint8_t time_head_bits;
  uint8_t run_head_bits;
  uint8_t zero;
  Section codes;  // code lengths of the three alphabets
  Section ranks;  // item of every popularity rank, bit-packed
  Section user_list;
  Section index;
  Section wide;
  uint32_t zero2;
  uint32_t crc;  // of all bytes before it
};
static_assert(sizeof(Header) == 8 + 8 + 6 * 8 + 16 + 8 + 5 * 24 + 8);

// Where the streams of 64 consecutive rows lie. Row r of the block has events event[r]..event[r+1],
// item bytes item[r]..item[r+1] and time bytes time[r]..time[r+1], counted from the block's start.
struct BlockIndex {
  uint64_t item_offset;  // in the file
  uint64_t time_offset;
  uint64_t first_event;
  uint32_t item_crc;
  uint32_t time_crc;
  uint16_t event[kBlockUsers + 1];
  uint16_t item[kBlockUsers + 1];
  uint16_t time[kBlockUsers + 1];
  uint16_t wide;  // 1: a number exceeds 16 bits; event[0..3] hold the u64 position in the wide section
};
static_assert(sizeof(BlockIndex) == 424);

struct WideIndex {
  uint64_t event[kBlockUsers + 1];
  uint64_t item[kBlockUsers + 1];
  uint64_t time[kBlockUsers + 1];
};

// The item symbols of a rank: one a feedback that the file can hold.
constexpr unsigned feedbacks_of(uint32_t features) { return features & kWithdrawals ? kFeedbacks : kFeedbacks - 1; }

// The rank of an item needs this many bits in the `ranks` section.
constexpr int bits_for(uint64_t count) {
  int bits = 0;
  while (bits < 63 && (uint64_t{1} << bits) < count) ++bits;
  return bits;
}

}  // namespace negfast
