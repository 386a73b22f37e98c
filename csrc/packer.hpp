// From requests to what the trainer reads: prompt tokens without padding, and the trie nodes of seen items.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "shard.hpp"

namespace negfast {

struct PackRequests {
  std::span<const int32_t> users;  // [B]
  const int64_t* cut;              // [B] events before this time, in seconds, are the context
  const uint8_t* views;            // [B] bit 0: likes shown, bit 1: dislikes shown
  const int32_t* trending_row;     // [B] row of the trending table, -1: no segment
  const int32_t* tail;             // [B] last token of the prompt, -1: none
};

struct PackLayout {
  int64_t like_cap, dislike_cap;  // most recent ones kept
  const int32_t* item_tokens;     // [items, levels]
  const int32_t* item_nodes;      // [items, levels] nodes are numbered in lexicographic order in every level
  int levels;
  uint64_t items;
  int32_t likes_marker, dislikes_marker, trending_marker;
  const int32_t* trending;        // [days, trending_width] items, -1 padded
  int64_t trending_days, trending_width;
  bool timeline;                  // likes and dislikes together in order of time, not one after the other
};

// The nodes of one level above (or at) the seen items of each request, ordered by (request, node).
struct SeenLevel {
  std::vector<int32_t> node, request, count;  // [M]
  std::vector<int32_t> slot;                  // [S] where in those a seen item's node is
};

struct Packed {
  std::vector<int32_t> tokens;     // [T]
  std::vector<int32_t> cu_seqlens;  // [B + 1]
  std::vector<int32_t> seen_item;  // [S] distinct items with an event before the cut, increasing within a request
  std::vector<int32_t> seen_cu;    // [B + 1]
  std::vector<SeenLevel> seen;     // [levels]
};

// Room for a Packed in memory of the caller's.
struct PackedRoom {
  struct Level {
    std::span<int32_t> node, request, count, slot;
  };
  std::span<int32_t> tokens, cu_seqlens, seen_item, seen_cu;
  std::vector<Level> seen;
};

// Packed requests, in the parts that tasks made of them: how large they are is known before they are put together.
class PackedParts {
 public:
  PackedParts(std::vector<Packed> parts, uint64_t requests, int levels);

  uint64_t requests() const { return requests_; }
  uint64_t tokens() const { return tokens_; }
  uint64_t seen() const { return seen_; }
  const std::vector<uint64_t>& nodes() const { return nodes_; }  // of every level

  // Throws ShardError where the room has not exactly these sizes.
  void write(const PackedRoom& room, unsigned threads) const;

 private:
  std::vector<Packed> parts_;
  uint64_t requests_, tokens_ = 0, seen_ = 0;
  std::vector<uint64_t> nodes_;
};

// Throws ShardError for requests that do not fit the shard or the tables, and for a damaged shard.
PackedParts pack(const Shard& shard, const PackRequests& requests, const PackLayout& layout, unsigned threads);

}  // namespace negfast
