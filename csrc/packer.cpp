#include "packer.hpp"

#include <algorithm>
#include <string>

#include "format.hpp"
#include "parallel.hpp"

namespace negfast {
namespace {

constexpr size_t kChunkRequests = 64;
constexpr uint8_t kLike = 1, kDislike = 2;  // also the bits of a view; 0: exposed, 3: withdrawn

// Which items this thread has met in the request at hand; clearing it is a new number, not a pass.
class MetItems {
 public:
  void start(uint64_t items) {
    if (stamp_.size() < items) stamp_.resize(items, 0);
    if (++request_ == 0) {
      std::fill(stamp_.begin(), stamp_.end(), 0);
      request_ = 1;
    }
  }
  bool meet(uint32_t item) {  // true the first time
    const bool fresh = stamp_[item] != request_;
    stamp_[item] = request_;
    return fresh;
  }

 private:
  std::vector<uint32_t> stamp_;
  uint32_t request_ = 0;
};

// Sorts by the low half of the keys, a byte at a time: quicker than comparisons for a request's hundred or so items.
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

struct Kept {
  int32_t item;
  uint8_t kind;  // kLike or kDislike
};

struct Scratch {
  std::vector<int64_t> offsets, time;
  std::vector<int32_t> item;
  std::vector<uint8_t> feedback;
  MetItems seen, judged;
  std::vector<Kept> kept;                  // most recent first
  std::vector<uint64_t> by_item, by_leaf;  // by_leaf: place among the request's items * 2^32 + leaf
  std::vector<uint64_t> other;             // of the sort
};

void check_requests(const PackRequests& r, const PackLayout& layout) {
  auto bad = [](size_t i, const std::string& what) { throw ShardError("request " + std::to_string(i) + ": " + what); };
  for (size_t i = 0; i < r.users.size(); ++i) {
    if (r.views[i] > 3) bad(i, "found view " + std::to_string(r.views[i]) + ", expected 0 to 3");
    if (r.trending_row[i] < -1 || r.trending_row[i] >= layout.trending_days)
      bad(i, "found trending row " + std::to_string(r.trending_row[i]) + ", expected -1 to " +
                 std::to_string(layout.trending_days - 1));
  }
  for (int64_t i = 0; i < layout.trending_days * layout.trending_width; ++i)
    if (layout.trending[i] < -1 || layout.trending[i] >= static_cast<int64_t>(layout.items))
      throw ShardError("trending: found item " + std::to_string(layout.trending[i]) + ", expected -1 to " +
                       std::to_string(layout.items - 1));
}

void append_item(int32_t item, const PackLayout& layout, std::vector<int32_t>& tokens) {
  const int32_t* row = layout.item_tokens + static_cast<size_t>(item) * layout.levels;
  tokens.insert(tokens.end(), row, row + layout.levels);
}

// The last like or dislike of every (user, item) counts and gives it its place, unless it was withdrawn; an exposure
// says nothing.
void collect_context(const int32_t* item, const uint8_t* feedback, int64_t events, const PackLayout& layout, Scratch& s,
                     std::vector<int32_t>& seen_item) {
  s.seen.start(layout.items);
  s.judged.start(layout.items);
  s.kept.clear();
  s.by_item.clear();
  int64_t likes_left = layout.like_cap, dislikes_left = layout.dislike_cap;
  for (int64_t i = events - 1; i >= 0; --i) {
    if (s.seen.meet(static_cast<uint32_t>(item[i]))) s.by_item.push_back(static_cast<uint64_t>(item[i]));
    if (feedback[i] == 0 || !s.judged.meet(static_cast<uint32_t>(item[i]))) continue;
    if (feedback[i] != kLike && feedback[i] != kDislike) continue;
    int64_t& left = feedback[i] == kLike ? likes_left : dislikes_left;
    if (left-- <= 0) continue;
    s.kept.push_back({item[i], feedback[i]});
  }
  radix_sort(s.by_item, s.other);
  for (const uint64_t seen : s.by_item) seen_item.push_back(static_cast<int32_t>(seen));
}

// The kept items of `kinds` in order of time: a marker at the start and wherever the kind changes.
void append_segment(uint8_t kinds, const PackLayout& layout, const std::vector<Kept>& kept,
                    std::vector<int32_t>& tokens) {
  auto mark = [&](uint8_t kind) { tokens.push_back(kind == kLike ? layout.likes_marker : layout.dislikes_marker); };
  uint8_t marked = kinds & kLike ? kLike : kDislike;
  mark(marked);
  for (auto next = kept.rbegin(); next != kept.rend(); ++next) {
    if (!(kinds & next->kind)) continue;
    if (next->kind != marked) mark(next->kind);
    append_item(next->item, layout, tokens);
    marked = next->kind;
  }
}

void append_prompt(const PackRequests& r, size_t i, const PackLayout& layout, const std::vector<Kept>& kept,
                   std::vector<int32_t>& tokens) {
  const uint8_t view = r.views[i];
  if (layout.timeline) {
    if (view != 0) append_segment(view, layout, kept, tokens);
  } else {
    if (view & kLike) append_segment(kLike, layout, kept, tokens);
    if (view & kDislike) append_segment(kDislike, layout, kept, tokens);
  }
  if (r.trending_row[i] >= 0) {
    tokens.push_back(layout.trending_marker);
    const int32_t* row = layout.trending + r.trending_row[i] * layout.trending_width;
    for (int64_t k = 0; k < layout.trending_width; ++k) {
      if (row[k] >= 0) append_item(row[k], layout, tokens);
    }
  }
  if (r.tail[i] >= 0) tokens.push_back(r.tail[i]);
}

// In the order of the leaves every level's nodes are in order too, so one sort serves all levels.
void append_seen_nodes(std::span<const int32_t> items, int32_t request, const PackLayout& layout, Scratch& s,
                       std::vector<SeenLevel>& seen) {
  s.by_leaf.clear();
  for (size_t k = 0; k < items.size(); ++k) {
    const int32_t leaf = layout.item_nodes[static_cast<size_t>(items[k] + 1) * layout.levels - 1];
    s.by_leaf.push_back(uint64_t{k} << 32 | static_cast<uint32_t>(leaf));
  }
  radix_sort(s.by_leaf, s.other);
  for (int level = 0; level < layout.levels; ++level) {
    SeenLevel& out = seen[level];
    const size_t first_slot = out.slot.size();
    out.slot.resize(first_slot + items.size());
    int32_t last = -1;
    for (const uint64_t key : s.by_leaf) {
      const auto k = static_cast<uint32_t>(key >> 32);
      const int32_t node = layout.item_nodes[static_cast<size_t>(items[k]) * layout.levels + level];
      if (node < last || node < 0)
        throw ShardError("item nodes: level " + std::to_string(level + 1) +
                         " is not numbered in the order of the leaves");
      if (node != last) {
        out.node.push_back(node);
        out.request.push_back(request);
        out.count.push_back(0);
        last = node;
      }
      ++out.count.back();
      out.slot[first_slot + k] = static_cast<int32_t>(out.node.size()) - 1;
    }
  }
}

// Requests [first, first + n) as a Packed of their own.
Packed pack_chunk(const Shard& shard, const PackRequests& r, size_t first, size_t n, const PackLayout& layout,
                  Scratch& s) {
  const auto users = r.users.subspan(first, n);
  s.offsets.resize(n + 1);
  shard.offsets(users, s.offsets.data());
  // Times are decoded only where a cut may leave events out.
  const bool any_cut = std::any_of(r.cut + first, r.cut + first + n, [&](int64_t t) { return t < shard.end_time(); });
  const auto events = static_cast<size_t>(s.offsets[n]);
  s.item.resize(events);
  s.feedback.resize(events);
  s.time.resize(any_cut ? events : 0);
  shard.read_chunk(users, s.offsets.data(), s.item.data(), s.feedback.data(), any_cut ? s.time.data() : nullptr);

  Packed out;
  out.cu_seqlens.push_back(0);
  out.seen_cu.push_back(0);
  out.seen.resize(layout.levels);
  for (size_t i = 0; i < n; ++i) {
    const int64_t begin = s.offsets[i];
    int64_t context = s.offsets[i + 1] - begin;
    if (any_cut) {
      const auto time = s.time.begin() + begin;
      context = std::lower_bound(time, time + context, r.cut[first + i]) - time;
    }
    collect_context(s.item.data() + begin, s.feedback.data() + begin, context, layout, s, out.seen_item);
    append_prompt(r, first + i, layout, s.kept, out.tokens);
    const auto seen_from = static_cast<size_t>(out.seen_cu.back());
    append_seen_nodes(std::span(out.seen_item).subspan(seen_from), static_cast<int32_t>(first + i), layout, s, out.seen);
    out.cu_seqlens.push_back(static_cast<int32_t>(out.tokens.size()));
    out.seen_cu.push_back(static_cast<int32_t>(out.seen_item.size()));
  }
  return out;
}

void copy(const std::vector<int32_t>& from, std::span<int32_t> to, uint64_t at, uint64_t shift = 0, size_t skip = 0) {
  const auto by = static_cast<int32_t>(shift);
  std::transform(from.begin() + static_cast<std::ptrdiff_t>(skip), from.end(),
                 to.begin() + static_cast<std::ptrdiff_t>(at), [by](int32_t value) { return value + by; });
}

}  // namespace

PackedParts::PackedParts(std::vector<Packed> parts, uint64_t requests, int levels)
    : parts_(std::move(parts)), requests_(requests), nodes_(static_cast<size_t>(levels), 0) {
  for (const Packed& part : parts_) {
    tokens_ += part.tokens.size();
    seen_ += part.seen_item.size();
    for (size_t level = 0; level < nodes_.size(); ++level) nodes_[level] += part.seen[level].node.size();
  }
  if (tokens_ > INT32_MAX || seen_ > INT32_MAX)
    throw ShardError("pack: found a batch of more than 2^31 tokens or seen items, expected a smaller one");
}

void PackedParts::write(const PackedRoom& room, unsigned threads) const {
  auto check = [](const char* name, size_t found, uint64_t expected) {
    if (found != expected)
      throw ShardError(std::string(name) + ": found room for " + std::to_string(found) + ", expected " +
                       std::to_string(expected));
  };
  check("tokens", room.tokens.size(), tokens_);
  check("cu_seqlens", room.cu_seqlens.size(), requests_ + 1);
  check("seen_item", room.seen_item.size(), seen_);
  check("seen_cu", room.seen_cu.size(), requests_ + 1);
  check("levels", room.seen.size(), nodes_.size());
  for (size_t level = 0; level < nodes_.size(); ++level) {
    check("seen_node", room.seen[level].node.size(), nodes_[level]);
    check("seen_request", room.seen[level].request.size(), nodes_[level]);
    check("seen_count", room.seen[level].count.size(), nodes_[level]);
    check("seen_slot", room.seen[level].slot.size(), seen_);
  }

  struct Start {
    uint64_t request = 0, token = 0, seen = 0;
    std::vector<uint64_t> node;
  };
  std::vector<Start> starts;
  Start at{0, 0, 0, std::vector<uint64_t>(nodes_.size(), 0)};
  for (const Packed& part : parts_) {
    starts.push_back(at);
    at.request += part.cu_seqlens.size() - 1;
    at.token += part.tokens.size();
    at.seen += part.seen_item.size();
    for (size_t level = 0; level < nodes_.size(); ++level) at.node[level] += part.seen[level].node.size();
  }
  room.cu_seqlens[0] = room.seen_cu[0] = 0;
  parallel_for(parts_.size(), threads, [&](size_t p, unsigned) {
    const Packed& part = parts_[p];
    const Start& start = starts[p];
    copy(part.tokens, room.tokens, start.token);
    copy(part.cu_seqlens, room.cu_seqlens, start.request + 1, start.token, 1);
    copy(part.seen_item, room.seen_item, start.seen);
    copy(part.seen_cu, room.seen_cu, start.request + 1, start.seen, 1);
    for (size_t level = 0; level < nodes_.size(); ++level) {
      const SeenLevel& from = part.seen[level];
      const PackedRoom::Level& to = room.seen[level];
      copy(from.node, to.node, start.node[level]);
      copy(from.request, to.request, start.node[level]);
      copy(from.count, to.count, start.node[level]);
      copy(from.slot, to.slot, start.seen, start.node[level]);
    }
  });
}

PackedParts pack(const Shard& shard, const PackRequests& requests, const PackLayout& layout, unsigned threads) {
  check_requests(requests, layout);
  if (layout.items < shard.items())
    throw ShardError("item tokens: found " + std::to_string(layout.items) + " rows, expected " +
                     std::to_string(shard.items()) + " or more");
  const size_t chunks = (requests.users.size() + kChunkRequests - 1) / kChunkRequests;
  std::vector<Packed> parts(chunks);
  std::vector<Scratch> scratch(std::max(1u, threads));
  parallel_for(chunks, threads, [&](size_t chunk, unsigned worker) {
    const size_t first = chunk * kChunkRequests, n = std::min(kChunkRequests, requests.users.size() - first);
    parts[chunk] = pack_chunk(shard, requests, first, n, layout, scratch[worker]);
  });
  return {std::move(parts), requests.users.size(), layout.levels};
}

}  // namespace negfast
