#include "packer.hpp"

#include <algorithm>
#include <bit>
#include <string>

#include "format.hpp"
#include "parallel.hpp"

namespace negfast {
namespace {

constexpr size_t kChunkHistories = 16;  // a task of a thread: a batch is tens of histories
constexpr uint8_t kLike = 1, kDislike = 2;  // also the bits of a view; 0: exposed, 3: withdrawn

// Which items this thread has met in the history at hand; clearing it is a new number, not a pass.
class MetItems {
 public:
  void start(uint64_t items) {
    if (stamp_.size() < items) stamp_.resize(items, 0);
    if (++history_ == 0) {
      std::fill(stamp_.begin(), stamp_.end(), 0);
      history_ = 1;
    }
  }
  bool meet(uint32_t item) {  // true the first time
    const bool fresh = stamp_[item] != history_;
    stamp_[item] = history_;
    return fresh;
  }

 private:
  std::vector<uint32_t> stamp_;
  uint32_t history_ = 0;
};

// Sorts by the low half of the keys, a byte at a time: quicker than comparisons for a user's hundred or so items.
void radix_sort(std::vector<uint64_t>& keys, std::vector<uint64_t>& other) {
  uint32_t used = 0;
  for (const uint64_t key : keys) used |= static_cast<uint32_t>(key);
  other.resize(keys.size());
  for (int shift = 0; shift < 32 && used >> shift != 0; shift += 8) {
    uint32_t next[257] = {};
    for (const uint64_t key : keys) ++next[((key >> shift) & 255) + 1];
    for (int digit = 0; digit < 256; ++digit) next[digit + 1] += next[digit];
    for (const uint64_t key : keys) other[next[(key >> shift) & 255]++] = key;
    keys.swap(other);
  }
}

struct Events {
  std::span<const int32_t> item;
  std::span<const uint8_t> feedback;
  std::span<const int64_t> time;

  size_t before(int64_t moment) const {
    return static_cast<size_t>(std::lower_bound(time.begin(), time.end(), moment) - time.begin());
  }
};

struct Scratch {
  std::vector<int64_t> offsets, time;
  std::vector<int32_t> item;
  std::vector<uint8_t> feedback;
  std::vector<int64_t> shown;     // times of the events of a history that its view shows
  MetItems met;
  std::vector<uint64_t> by_item;  // the first event of an item * 2^32 + the item
  std::vector<uint64_t> by_leaf;  // a place in by_item * 2^32 + the leaf of the item there
  std::vector<uint64_t> other;    // of the sort
  std::vector<int32_t> place;     // of by_item's items among those that a branch has seen, -1: not seen
  std::vector<uint64_t> seen;     // in order of leaves: that place * 2^32 + the item
};

[[noreturn]] void bad(const char* what, size_t i, const std::string& found) {
  throw ShardError(std::string(what) + " " + std::to_string(i) + ": found " + found);
}

void check_input(const PackHistories& histories, const PackBranches& branches) {
  const size_t n = histories.users.size();
  for (size_t i = 0; i < n; ++i)
    if (histories.views[i] > 3) bad("history", i, "view " + std::to_string(histories.views[i]) + ", expected 0 to 3");
  int32_t last = 0;
  for (size_t a = 0; a < branches.history.size(); ++a) {
    const int32_t history = branches.history[a];
    if (history < last || static_cast<size_t>(history) >= n)
      bad("branch", a, "history " + std::to_string(history) + ", expected " + std::to_string(last) + " to " +
                           std::to_string(static_cast<int64_t>(n) - 1) + " (ascending)");
    last = history;
  }
}

// The bucket of a time that is not negative: 0 is left for what has no event before it.
uint8_t gap_bucket(int64_t from, int64_t to) {
  const uint64_t seconds = static_cast<uint64_t>(to) - static_cast<uint64_t>(from);  // any two times, no overflow
  return static_cast<uint8_t>(std::min<int>(kGaps - 1, 1 + static_cast<int>(std::bit_width(seconds / 64))));
}

// A start, then the events [first, end) that the view shows; `shown` becomes their times.
void append_positions(const Events& events, size_t first, size_t end, uint8_t view, std::vector<int64_t>& shown,
                      Packed& out) {
  out.item.push_back(-1);
  out.feedback.push_back(kStart);
  out.gap.push_back(0);
  shown.clear();
  for (size_t i = first; i < end; ++i) {
    const uint8_t feedback = events.feedback[i];
    const uint8_t needed = feedback == kLike || feedback == kDislike ? feedback : kLike | kDislike;
    if ((view & needed) != needed) continue;
    out.item.push_back(events.item[i]);
    out.feedback.push_back(feedback);
    out.gap.push_back(shown.empty() ? 0 : gap_bucket(shown.back(), events.time[i]));
    shown.push_back(events.time[i]);
  }
}

void append_branch(int64_t moment, const std::vector<int64_t>& shown, Packed& out) {
  const auto end = std::lower_bound(shown.begin(), shown.end(), moment);
  out.prefix.push_back(static_cast<int32_t>(1 + (end - shown.begin())));
  out.branch_gap.push_back(end == shown.begin() ? 0 : gap_bucket(end[-1], moment));
}

// Sorts the distinct items of the first `end` events once for all branches of a history.
void collect_items(const Events& events, size_t end, const ItemNodes& tree, Scratch& s) {
  s.met.start(tree.items);
  s.by_item.clear();
  for (size_t i = 0; i < end; ++i) {
    const auto item = static_cast<uint32_t>(events.item[i]);
    if (s.met.meet(item)) s.by_item.push_back(uint64_t{i} << 32 | item);
  }
  radix_sort(s.by_item, s.other);
  s.by_leaf.clear();
  for (size_t k = 0; k < s.by_item.size(); ++k) {
    const auto item = static_cast<uint32_t>(s.by_item[k]);
    const int32_t leaf = tree.nodes[(size_t{item} + 1) * tree.levels - 1];
    s.by_leaf.push_back(uint64_t{k} << 32 | static_cast<uint32_t>(leaf));
  }
  radix_sort(s.by_leaf, s.other);
}

// What a branch that sees the first `end` events has seen of the collected items. In the order of the leaves every
// level's nodes are in order too, so one sort serves all levels.
void append_seen(size_t end, const ItemNodes& tree, Scratch& s, Packed& out) {
  const auto request = static_cast<int32_t>(out.seen_cu.size()) - 1;
  s.place.resize(s.by_item.size());
  int32_t places = 0;
  for (size_t k = 0; k < s.by_item.size(); ++k) {
    const bool seen = s.by_item[k] >> 32 < end;
    s.place[k] = seen ? places++ : -1;
    if (seen) out.seen_item.push_back(static_cast<int32_t>(s.by_item[k]));
  }
  out.seen_cu.push_back(static_cast<int32_t>(out.seen_item.size()));
  s.seen.clear();
  for (const uint64_t key : s.by_leaf) {
    const int32_t place = s.place[key >> 32];
    if (place >= 0) s.seen.push_back(static_cast<uint64_t>(place) << 32 | static_cast<uint32_t>(s.by_item[key >> 32]));
  }
  for (int level = 0; level < tree.levels; ++level) {
    SeenLevel& nodes = out.seen[level];
    const size_t first_slot = nodes.slot.size();
    nodes.slot.resize(first_slot + s.seen.size());
    int32_t last = -1;
    for (const uint64_t key : s.seen) {
      const int32_t node = tree.nodes[size_t{static_cast<uint32_t>(key)} * tree.levels + level];
      if (node < last || node < 0)
        throw ShardError("item nodes: level " + std::to_string(level + 1) +
                         " is not numbered in the order of the leaves");
      if (node != last) {
        nodes.node.push_back(node);
        nodes.request.push_back(request);
        nodes.count.push_back(0);
        last = node;
      }
      ++nodes.count.back();
      nodes.slot[first_slot + (key >> 32)] = static_cast<int32_t>(nodes.node.size()) - 1;
    }
  }
}

// Histories [from, from + n) as a Packed of their own.
Packed pack_chunk(const Shard& shard, const PackHistories& histories, size_t from, size_t n,
                  const PackBranches& branches, const ItemNodes& tree, Scratch& s) {
  const auto users = histories.users.subspan(from, n);
  s.offsets.resize(n + 1);
  shard.offsets(users, s.offsets.data());
  const auto total = static_cast<size_t>(s.offsets[n]);
  s.item.resize(total);
  s.feedback.resize(total);
  s.time.resize(total);
  shard.read_chunk(users, s.offsets.data(), s.item.data(), s.feedback.data(), s.time.data());

  Packed out;
  out.cu_seqlens.push_back(0);
  out.seen_cu.push_back(0);
  out.seen.resize(tree.levels);
  auto next_branch = std::lower_bound(branches.history.begin(), branches.history.end(), static_cast<int32_t>(from));
  for (size_t i = 0; i < n; ++i) {
    const auto begin = static_cast<size_t>(s.offsets[i]), size = static_cast<size_t>(s.offsets[i + 1]) - begin;
    const Events events{{s.item.data() + begin, size}, {s.feedback.data() + begin, size}, {s.time.data() + begin, size}};
    const int64_t first = histories.first[from + i];
    if (first < 0 || first > static_cast<int64_t>(size))
      bad("history", from + i, "first event " + std::to_string(first) + ", expected 0 to " + std::to_string(size));
    const auto a = static_cast<size_t>(next_branch - branches.history.begin());
    next_branch = std::upper_bound(next_branch, branches.history.end(), static_cast<int32_t>(from + i));
    const auto a_end = static_cast<size_t>(next_branch - branches.history.begin());
    size_t end = 0;  // events that any branch sees
    for (size_t b = a; b < a_end; ++b) end = std::max(end, events.before(branches.moments[b]));
    append_positions(events, static_cast<size_t>(first), end, histories.views[from + i], s.shown, out);
    out.cu_seqlens.push_back(static_cast<int32_t>(out.item.size()));
    collect_items(events, end, tree, s);
    for (size_t b = a; b < a_end; ++b) {
      append_branch(branches.moments[b], s.shown, out);
      append_seen(events.before(branches.moments[b]), tree, s, out);
    }
  }
  return out;
}

template <class T>
void copy(const std::vector<T>& from, std::span<T> to, uint64_t at, uint64_t shift = 0, size_t skip = 0) {
  const auto by = static_cast<T>(shift);
  std::transform(from.begin() + static_cast<std::ptrdiff_t>(skip), from.end(),
                 to.begin() + static_cast<std::ptrdiff_t>(at), [by](T value) { return static_cast<T>(value + by); });
}

}  // namespace

PackedParts::PackedParts(std::vector<Packed> parts, int levels)
    : parts_(std::move(parts)), nodes_(static_cast<size_t>(levels), 0) {
  for (const Packed& part : parts_) {
    histories_ += part.cu_seqlens.size() - 1;
    positions_ += part.item.size();
    branches_ += part.prefix.size();
    seen_ += part.seen_item.size();
    for (size_t level = 0; level < nodes_.size(); ++level) nodes_[level] += part.seen[level].node.size();
  }
  if (positions_ > INT32_MAX || seen_ > INT32_MAX)
    throw ShardError("pack: found a batch of more than 2^31 positions or seen items, expected a smaller one");
}

void PackedParts::write(const PackedRoom& room, unsigned threads) const {
  auto check = [](const char* name, size_t found, uint64_t expected) {
    if (found != expected)
      throw ShardError(std::string(name) + ": found room for " + std::to_string(found) + ", expected " +
                       std::to_string(expected));
  };
  check("item", room.item.size(), positions_);
  check("feedback", room.feedback.size(), positions_);
  check("gap", room.gap.size(), positions_);
  check("cu_seqlens", room.cu_seqlens.size(), histories_ + 1);
  check("prefix", room.prefix.size(), branches_);
  check("branch_gap", room.branch_gap.size(), branches_);
  check("seen_item", room.seen_item.size(), seen_);
  check("seen_cu", room.seen_cu.size(), branches_ + 1);
  check("levels", room.seen.size(), nodes_.size());
  for (size_t level = 0; level < nodes_.size(); ++level) {
    check("seen_node", room.seen[level].node.size(), nodes_[level]);
    check("seen_request", room.seen[level].request.size(), nodes_[level]);
    check("seen_count", room.seen[level].count.size(), nodes_[level]);
    check("seen_slot", room.seen[level].slot.size(), seen_);
  }

  struct Start {
    uint64_t history = 0, position = 0, branch = 0, seen = 0;
    std::vector<uint64_t> node;
  };
  std::vector<Start> starts;
  Start at;
  at.node.resize(nodes_.size());
  for (const Packed& part : parts_) {
    starts.push_back(at);
    at.history += part.cu_seqlens.size() - 1;
    at.position += part.item.size();
    at.branch += part.prefix.size();
    at.seen += part.seen_item.size();
    for (size_t level = 0; level < nodes_.size(); ++level) at.node[level] += part.seen[level].node.size();
  }
  room.cu_seqlens[0] = room.seen_cu[0] = 0;
  parallel_for(parts_.size(), threads, [&](size_t p, unsigned) {
    const Packed& part = parts_[p];
    const Start& start = starts[p];
    copy(part.item, room.item, start.position);
    copy(part.feedback, room.feedback, start.position);
    copy(part.gap, room.gap, start.position);
    copy(part.cu_seqlens, room.cu_seqlens, start.history + 1, start.position, 1);
    copy(part.prefix, room.prefix, start.branch);
    copy(part.branch_gap, room.branch_gap, start.branch);
    copy(part.seen_item, room.seen_item, start.seen);
    copy(part.seen_cu, room.seen_cu, start.branch + 1, start.seen, 1);
    for (size_t level = 0; level < nodes_.size(); ++level) {
      const SeenLevel& from = part.seen[level];
      const PackedRoom::Level& to = room.seen[level];
      copy(from.node, to.node, start.node[level]);
      copy(from.request, to.request, start.node[level], start.branch);
      copy(from.count, to.count, start.node[level]);
      copy(from.slot, to.slot, start.seen, start.node[level]);
    }
  });
}

PackedParts pack(const Shard& shard, const PackHistories& histories, const PackBranches& branches,
                 const ItemNodes& item_nodes, unsigned threads) {
  check_input(histories, branches);
  if (item_nodes.items < shard.items() || item_nodes.levels < 1)
    throw ShardError("item nodes: found " + std::to_string(item_nodes.items) + " rows of " +
                     std::to_string(item_nodes.levels) + " levels, expected " + std::to_string(shard.items()) +
                     " rows or more of 1 level or more");
  const size_t n = histories.users.size(), chunks = (n + kChunkHistories - 1) / kChunkHistories;
  std::vector<Packed> parts(chunks);
  std::vector<Scratch> scratch(std::max(1u, threads));
  parallel_for(chunks, threads, [&](size_t chunk, unsigned worker) {
    const size_t from = chunk * kChunkHistories;
    parts[chunk] = pack_chunk(shard, histories, from, std::min(kChunkHistories, n - from), branches, item_nodes,
                              scratch[worker]);
  });
  return {std::move(parts), item_nodes.levels};
}

}  // namespace negfast
