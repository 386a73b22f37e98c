#include "source.hpp"

#include <algorithm>

namespace negfast {

int64_t MemorySource::earliest() const {
  bool found = false;
  int64_t earliest = 0;
  for (uint64_t r = 0; r < rows(); ++r) {
    if (all_.offsets[r] == all_.offsets[r + 1]) continue;
    const int64_t first = all_.time[all_.offsets[r]];
    if (!found || first < earliest) earliest = first;
    found = true;
  }
  return earliest;
}

SortingSource::SortingSource(std::string folder, uint64_t users, uint64_t items, uint64_t memory_bytes)
    : folder_(std::move(folder)), users_(users), items_(items) {
  // A run and its sorted copy are in memory together.
  run_events_ = std::max<size_t>(memory_bytes / (2 * sizeof(Event)), 1024);
}

void SortingSource::add(std::span<const int32_t> user, const int32_t* item, const uint8_t* feedback,
                        const int64_t* time) {
  for (size_t i = 0; i < user.size(); ++i) {
    if (user[i] < 0 || static_cast<uint64_t>(user[i]) >= users_)
      throw ShardError("event " + std::to_string(i) + ": found user " + std::to_string(user[i]) + ", expected 0 to " +
                       std::to_string(users_ - 1));
    if (item[i] < 0 || static_cast<uint64_t>(item[i]) >= items_)
      throw ShardError("event " + std::to_string(i) + ": found item " + std::to_string(item[i]) + ", expected 0 to " +
                       std::to_string(items_ - 1));
    if (feedback[i] >= kFeedbacks)
      throw ShardError("event " + std::to_string(i) + ": found feedback " + std::to_string(feedback[i]) +
                       ", expected 0 to 3");
    if (runs_.empty() && pending_.empty()) earliest_ = time[i];
    earliest_ = std::min(earliest_, time[i]);
    if (pending_.size() == run_events_) spill();
    if (pending_.empty()) pending_.reserve(run_events_);
    pending_.push_back({static_cast<uint32_t>(user[i]), static_cast<uint32_t>(item[i]) << 2 | feedback[i], time[i]});
  }
}

// Counting sort by user keeps the order of arrival; times within a user are mostly in order already.
void SortingSource::spill() {
  if (pending_.empty()) return;
  std::vector<uint32_t> next(users_ + 1, 0);
  for (const Event& e : pending_) ++next[e.user + 1];
  for (size_t u = 0; u < users_; ++u) next[u + 1] += next[u];
  const std::vector<uint32_t> first = next;
  std::vector<Event> sorted(pending_.size());
  for (const Event& e : pending_) sorted[next[e.user]++] = e;
  const auto earlier = [](const Event& a, const Event& b) { return a.time < b.time; };
  for (size_t u = 0; u < users_; ++u) {
    const auto begin = sorted.begin() + first[u], end = sorted.begin() + first[u + 1];
    if (!std::is_sorted(begin, end, earlier)) std::stable_sort(begin, end, earlier);
  }

  Run run{std::make_unique<ScratchFile>(folder_), {}};
  for (uint64_t u = 0; u < users_; u += kStripeUsers) run.stripes.push_back(first[u]);
  run.stripes.push_back(sorted.size());
  run.file->append(sorted.data(), sorted.size() * sizeof(Event));
  runs_.push_back(std::move(run));
  pending_.clear();
}

Histories SortingSource::read(uint64_t first, uint64_t count, SourceBuffer& b) const {
  const uint64_t stripe = first / kStripeUsers;
  uint64_t total = 0;
  for (const Run& run : runs_) total += run.stripes[stripe + 1] - run.stripes[stripe];
  b.raw.resize(total * sizeof(Event));
  auto* events = reinterpret_cast<Event*>(b.raw.data());
  uint64_t at = 0;
  for (const Run& run : runs_) {
    const uint64_t n = run.stripes[stripe + 1] - run.stripes[stripe];
    run.file->read(events + at, n * sizeof(Event), run.stripes[stripe] * sizeof(Event));
    at += n;
  }

  // Runs came in order of arrival, so a stable sort by user and then by time keeps that order among ties.
  b.offsets.assign(count + 1, 0);
  for (uint64_t i = 0; i < total; ++i) ++b.offsets[events[i].user - first + 1];
  for (uint64_t r = 0; r < count; ++r) b.offsets[r + 1] += b.offsets[r];
  std::vector<int64_t> next(b.offsets.begin(), b.offsets.end() - 1);
  std::vector<uint64_t> order(total);
  for (uint64_t i = 0; i < total; ++i) order[next[events[i].user - first]++] = i;
  const auto earlier = [&](uint64_t x, uint64_t y) { return events[x].time < events[y].time; };
  for (uint64_t r = 0; r < count; ++r) {
    const auto begin = order.begin() + b.offsets[r], end = order.begin() + b.offsets[r + 1];
    if (!std::is_sorted(begin, end, earlier)) std::stable_sort(begin, end, earlier);
  }

  b.item.resize(total);
  b.feedback.resize(total);
  b.time.resize(total);
  for (uint64_t i = 0; i < total; ++i) {
    const Event& e = events[order[i]];
    b.item[i] = static_cast<int32_t>(e.item_feedback >> 2);
    b.feedback[i] = e.item_feedback & 3;
    b.time[i] = e.time;
  }
  return {b.offsets, b.item.data(), b.feedback.data(), b.time.data()};
}

}  // namespace negfast
