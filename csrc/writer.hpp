// Writes a shard file: one pass over the events to learn the codes, one to encode.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "source.hpp"

namespace negfast {

struct WriteOptions {
  uint64_t users;                      // size of the user index space
  uint64_t items;                      // size of the item index space
  uint32_t time_unit = 1;              // seconds
  unsigned threads = 1;                // no influence on the bytes written
  std::span<const uint32_t> user_list;  // the user of every row, increasing; empty: row r is user r
};

// The file appears under `path` complete or not at all. Throws ShardError.
void write_shard(const std::string& path, const EventSource& source, const WriteOptions& options);

}  // namespace negfast
