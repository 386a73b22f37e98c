#include "source.hpp"

#include <algorithm>

namespace negfast {
namespace {

// By user, of first to first + count - 1, and by time; equal ones keep their order. Most come in order.
void sort_events(std::vector<Event>& events, uint64_t first, uint64_t count) {
  const auto earlier = [](const Event& a, const Event& b) { return a.time < b.time; };
  const auto before = [&](const Event& a, const Event& b) { return a.user != b.user ? a.user < b.user : earlier(a, b); };
  if (std::is_sorted(events.begin(), events.end(), before)) return;
  std::vector<uint64_t> next(count + 1, 0);  // where a user's next event goes, and at last where the next user begins
  for (const Event& e : events) ++next[e.user - first + 1];
  for (uint64_t u = 0; u < count; ++u) next[u + 1] += next[u];
  std::vector<Event> sorted(events.size());
  for (const Event& e : events) sorted[next[e.user - first]++] = e;
  auto begin = sorted.begin();
  for (uint64_t u = 0; u < count; ++u) {
    const auto end = sorted.begin() + static_cast<ptrdiff_t>(next[u]);
    if (!std::is_sorted(begin, end, earlier)) std::stable_sort(begin, end, earlier);
    begin = end;
  }
  events.swap(sorted);
}

}  // namespace

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

void SortingSource::spill() {
  if (pending_.empty()) return;
  sort_events(pending_, 0, users_);
  Run run{std::make_unique<ScratchFile>(folder_), {}};
  const auto before = [](const Event& e, uint64_t user) { return e.user < user; };
  for (uint64_t u = 0; u < users_; u += kStripeUsers)
    run.stripes.push_back(std::lower_bound(pending_.begin(), pending_.end(), u, before) - pending_.begin());
  run.stripes.push_back(pending_.size());
  run.file->append(pending_.data(), pending_.size() * sizeof(Event));
  runs_.push_back(std::move(run));
  pending_.clear();
}

Histories SortingSource::read(uint64_t first, uint64_t count, SourceBuffer& b) const {
  const uint64_t stripe = first / kStripeUsers;
  uint64_t total = 0;
  for (const Run& run : runs_) total += run.stripes[stripe + 1] - run.stripes[stripe];
  b.events.resize(total);
  uint64_t at = 0;
  for (const Run& run : runs_) {
    const uint64_t n = run.stripes[stripe + 1] - run.stripes[stripe];
    run.file->read(b.events.data() + at, n * sizeof(Event), run.stripes[stripe] * sizeof(Event));
    at += n;
  }
  sort_events(b.events, first, count);  // runs came in order of arrival

  b.offsets.assign(count + 1, 0);
  b.item.resize(total);
  b.feedback.resize(total);
  b.time.resize(total);
  for (uint64_t i = 0; i < total; ++i) {
    const Event& e = b.events[i];
    ++b.offsets[e.user - first + 1];
    b.item[i] = static_cast<int32_t>(e.item_feedback >> 2);
    b.feedback[i] = e.item_feedback & 3;
    b.time[i] = e.time;
  }
  for (uint64_t r = 0; r < count; ++r) b.offsets[r + 1] += b.offsets[r];
  return {b.offsets, b.item.data(), b.feedback.data(), b.time.data()};
}

}  // namespace negfast
