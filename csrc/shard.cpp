#include "shard.hpp"

#include <algorithm>
#include <cstring>

#include "parallel.hpp"

namespace negfast {
namespace {

constexpr size_t kChunkUsers = 256;  // a task of a thread: enough to keep all lanes busy, small enough for its cache

}  // namespace

Shard::Shard(const std::vector<std::string>& paths) {
  for (const std::string& path : paths) {
    files_.push_back(std::make_unique<ShardFile>(path));
    const Header& h = files_.back()->header();
    users_ = std::max(users_, h.users);
    items_ = std::max(items_, h.items);
    events_ += h.events;
  }
}

uint64_t Shard::events_of(int32_t user) const {
  if (user < 0 || static_cast<uint64_t>(user) >= users_)
    throw ShardError("found user " + std::to_string(user) + ", expected 0 to " + std::to_string(users_ - 1));
  uint64_t events = 0;
  for (const auto& file : files_)
    if (const auto row = file->row_of(static_cast<uint32_t>(user))) events += file->events_of(*row);
  return events;
}

void Shard::offsets(std::span<const int32_t> users, int64_t* offsets) const {
  offsets[0] = 0;
  for (size_t i = 0; i < users.size(); ++i) offsets[i + 1] = offsets[i] + static_cast<int64_t>(events_of(users[i]));
}

template <class Decode>
void Shard::for_each_file(std::span<const int32_t> users, const int64_t* offsets, Stream stream,
                          Decode&& decode) const {
  std::vector<DecodeJob> jobs;
  std::vector<uint64_t> at(users.size());
  for (size_t i = 0; i < users.size(); ++i) at[i] = static_cast<uint64_t>(offsets[i] - offsets[0]);
  for (const auto& file : files_) {
    jobs.clear();
    for (size_t i = 0; i < users.size(); ++i) {
      const auto row = file->row_of(static_cast<uint32_t>(users[i]));
      if (!row) continue;
      const RowStreams s = file->streams(*row);
      const bool items = stream == Stream::items;
      const uint64_t begin = items ? s.item_begin : s.time_begin, end = items ? s.item_end : s.time_end;
      for (uint64_t byte = begin; byte < end; byte += 64) __builtin_prefetch(file->data() + byte);
      if (items)
        file->check_items(s.block);
      else
        file->check_times(s.block);
      jobs.push_back({begin, end, s.events, at[i]});
      at[i] += s.events;
    }
    decode(*file, DecodeJobs(jobs));
  }
}

void Shard::read_chunk(std::span<const int32_t> users, const int64_t* offsets, int32_t* item, uint8_t* feedback,
                       int64_t* time) const {
  if (item != nullptr)
    for_each_file(users, offsets, Stream::items,
                  [&](const ShardFile& file, auto jobs) { decode_items(file, jobs, item, feedback); });
  if (time != nullptr)
    for_each_file(users, offsets, Stream::times, [&](const ShardFile& file, auto jobs) { decode_times(file, jobs, time); });
}

template <class Body>
static void for_each_chunk(size_t users, unsigned threads, Body&& body) {
  parallel_for((users + kChunkUsers - 1) / kChunkUsers, threads, [&](size_t chunk, unsigned) {
    const size_t first = chunk * kChunkUsers;
    body(first, std::min(kChunkUsers, users - first));
  });
}

void Shard::read(std::span<const int32_t> users, const int64_t* offsets, int32_t* item, uint8_t* feedback,
                 int64_t* time, unsigned threads) const {
  for_each_chunk(users.size(), threads, [&](size_t first, size_t n) {
    const int64_t start = offsets[first];
    read_chunk(users.subspan(first, n), offsets + first, item + start, feedback + start, time + start);
  });
}

void Shard::read_rows(std::span<const int32_t> users, const int64_t* offsets, const uint8_t* table, size_t row_bytes,
                      uint8_t* out, unsigned threads) const {
  const auto events = static_cast<uint64_t>(offsets[users.size()]);
  if (events < items_) {  // too few to be worth a table of their own
    for_each_chunk(users.size(), threads, [&](size_t first, size_t n) {
      const auto start = static_cast<size_t>(offsets[first]), count = static_cast<size_t>(offsets[first + n]) - start;
      std::vector<int32_t> item(count);
      std::vector<uint8_t> feedback(count);
      read_chunk(users.subspan(first, n), offsets + first, item.data(), feedback.data(), nullptr);
      for (size_t i = 0; i < count; ++i)
        std::memcpy(out + (start + i) * row_bytes, table + static_cast<size_t>(item[i]) * row_bytes, row_bytes);
    });
    return;
  }
  // In the order of ranks the rows that are needed most share cache lines, and one look-up is saved.
  std::vector<std::vector<uint8_t>> by_rank(files_.size());
  for (size_t f = 0; f < files_.size(); ++f) {
    const ShardFile& file = *files_[f];
    by_rank[f].resize(file.expressible_ranks() * row_bytes);
    for (uint64_t rank = 0; rank < file.header().ranked; ++rank)
      std::memcpy(by_rank[f].data() + rank * row_bytes, table + size_t{file.item_of_rank()[rank]} * row_bytes, row_bytes);
  }
  for_each_chunk(users.size(), threads, [&](size_t first, size_t n) {
    uint8_t* here = out + static_cast<size_t>(offsets[first]) * row_bytes;
    size_t f = 0;
    for_each_file(users.subspan(first, n), offsets + first, Stream::items, [&](const ShardFile& file, auto jobs) {
      decode_rows(file, jobs, by_rank[f++].data(), row_bytes, here);
    });
  });
}

}  // namespace negfast
