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

inline constexpr int kLanes = 4;

namespace detail {

struct Lane {
  uint64_t bit;
  uint64_t at;
  uint64_t left;
  uint64_t state;
  uint64_t end;
};

// `emit(at, value, tag, state)` takes every symbol; `state` is the stream's own running value.
// kPerWindow symbols fit the 57 bits that an unaligned 8-byte load is sure to hold.
template <int kPerWindow, class Emit>
inline void step(const uint8_t* data, const DecodeEntry* table, Lane& lane, Emit& emit) {
  uint64_t window = load64(data + (lane.bit >> 3)) >> (lane.bit & 7);
#pragma GCC unroll 4
  for (int i = 0; i < kPerWindow; ++i) {
    const DecodeEntry entry = table[window & ((1u << kMaxCodeBits) - 1)];
    const unsigned total = entry & 255;
    const uint64_t extra = low_bits(window, total) >> ((entry >> 8) & 63);
    emit(lane.at, (entry >> 24) + extra, static_cast<uint8_t>(entry >> 16), lane.state);
    window >>= total;
    lane.bit += total;
    ++lane.at;
  }
}

// How many events all these lanes can take before one ends or could read beyond the file. The index lies
// behind every stream, so only a stream that lies about its length comes near the file's end.
inline uint64_t common_run(const ShardFile& file, const DecodeTable& table, const Lane* lanes, int n) {
  const uint64_t limit = (file.size() - 8) * 8;
  uint64_t run = lanes[0].left;
  for (int k = 0; k < n; ++k) {
    const uint64_t safe = lanes[k].bit > limit ? 0 : (limit - lanes[k].bit) / table.max_bits;
    if (safe == 0) file.damaged("a stream runs beyond the end of the file");
    run = std::min({run, lanes[k].left, safe});
  }
  return run;
}

template <int kCount, int kPerWindow, class Emit>
inline void run_lanes(const uint8_t* data, const DecodeEntry* table, Lane* lanes, uint64_t run, Emit& emit) {
  Lane local[kCount];
  std::copy(lanes, lanes + kCount, local);
  uint64_t i = 0;
  for (; i + kPerWindow <= run; i += kPerWindow)
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) step<kPerWindow>(data, table, local[k], emit);
  for (; i < run; ++i)
    for (int k = 0; k < kCount; ++k) step<1>(data, table, local[k], emit);
  for (int k = 0; k < kCount; ++k) local[k].left -= run;
  std::copy(local, local + kCount, lanes);
}

template <int kPerWindow, class Emit>
void decode_streams(const ShardFile& file, const DecodeTable& table, std::span<const DecodeJob> jobs,
                    uint64_t initial_state, Emit emit) {
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
    const uint64_t run = common_run(file, table, lanes, active);
    if (active == kLanes)
      run_lanes<kLanes, kPerWindow>(file.data(), table.entries.data(), lanes, run, emit);
    else
      for (int k = 0; k < active; ++k) run_lanes<1, kPerWindow>(file.data(), table.entries.data(), lanes + k, run, emit);
    for (int k = active - 1; k >= 0; --k) {
      if (lanes[k].left > 0) continue;
      if ((lanes[k].bit + 7) / 8 * 8 != lanes[k].end) file.damaged("a stream ends elsewhere than its index says");
      if (!refill(k)) lanes[k] = lanes[--active];
    }
  }
}

}  // namespace detail

// Decodes one stream a job, each a plain sequence of the table's symbols.
template <class Emit>
void decode_streams(const ShardFile& file, const DecodeTable& table, std::span<const DecodeJob> jobs,
                    uint64_t initial_state, Emit emit) {
  if (table.max_bits * 3 <= 57)
    detail::decode_streams<3>(file, table, jobs, initial_state, emit);
  else if (table.max_bits * 2 <= 57)
    detail::decode_streams<2>(file, table, jobs, initial_state, emit);
  else
    detail::decode_streams<1>(file, table, jobs, initial_state, emit);
}

// Items and feedbacks, to item[at] and feedback[at].
void decode_items(const ShardFile& file, std::span<const DecodeJob> jobs, int32_t* item, uint8_t* feedback);

// Times in seconds, to time[at].
void decode_times(const ShardFile& file, std::span<const DecodeJob> jobs, int64_t* time);

}  // namespace negfast
