#include "shard.hpp"

#include <algorithm>

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
    if (h.events > 0)
      end_time_ = std::max(end_time_, static_cast<int64_t>((static_cast<uint64_t>(h.time_last) + 1) * h.time_unit));
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

void Shard::read_chunk(std::span<const int32_t> users, const int64_t* offsets, int32_t* item, uint8_t* feedback,
                       int64_t* time) const {
  std::vector<DecodeJob> item_jobs, time_jobs;
  std::vector<uint64_t> at(users.size());
  for (size_t i = 0; i < users.size(); ++i) at[i] = static_cast<uint64_t>(offsets[i] - offsets[0]);
  for (const auto& file : files_) {
    item_jobs.clear();
    time_jobs.clear();
    for (size_t i = 0; i < users.size(); ++i) {
      const auto row = file->row_of(static_cast<uint32_t>(users[i]));
      if (!row) continue;
      const RowStreams s = file->streams(*row);
      if (item != nullptr) {
        for (uint64_t byte = s.item_begin; byte < s.item_end; byte += 64) __builtin_prefetch(file->data() + byte);
        item_jobs.push_back({s.item_begin, s.item_end, s.events, at[i]});
      }
      if (time != nullptr) {
        for (uint64_t byte = s.time_begin; byte < s.time_end; byte += 64) __builtin_prefetch(file->data() + byte);
        time_jobs.push_back({s.time_begin, s.time_end, s.events, at[i]});
      }
      at[i] += s.events;
      if (item != nullptr) file->check_items(s.block);
      if (time != nullptr) file->check_times(s.block);
    }
    if (item != nullptr) decode_items(*file, item_jobs, item, feedback);
    if (time != nullptr) decode_times(*file, time_jobs, time);
  }
}

void Shard::read(std::span<const int32_t> users, const int64_t* offsets, int32_t* item, uint8_t* feedback,
                 int64_t* time, unsigned threads) const {
  const size_t chunks = (users.size() + kChunkUsers - 1) / kChunkUsers;
  parallel_for(chunks, threads, [&](size_t chunk, unsigned) {
    const size_t first = chunk * kChunkUsers, n = std::min(kChunkUsers, users.size() - first);
    const int64_t start = offsets[first];
    read_chunk(users.subspan(first, n), offsets + first, item ? item + start : nullptr,
               feedback ? feedback + start : nullptr, time ? time + start : nullptr);
  });
}

}  // namespace negfast
