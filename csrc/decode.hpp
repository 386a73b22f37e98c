// Decoding streams of a shard file. Blocks are verified before; what a stream says is checked all the same.
#pragma once

#include <cstdint>
#include <span>

#include "shard_file.hpp"

namespace negfast {

// One stream: `events` symbols from byte `begin`, the first of them being number `at` of the output.
struct DecodeJob {
  uint64_t begin, end;  // bytes in the file
  uint64_t events;
  uint64_t at;
};

using DecodeJobs = std::span<const DecodeJob>;

// Items and feedbacks, to item[at] and feedback[at].
void decode_items(const ShardFile& file, DecodeJobs jobs, int32_t* item, uint8_t* feedback);

// The row of a table that belongs to every item's rank, to out[at * row_bytes]. The table has a row for
// every rank that a symbol can express (ShardFile::expressible_ranks).
void decode_rows(const ShardFile& file, DecodeJobs jobs, const uint8_t* table_by_rank, size_t row_bytes, uint8_t* out);

// Times in seconds, to time[at].
void decode_times(const ShardFile& file, DecodeJobs jobs, int64_t* time);

}  // namespace negfast
