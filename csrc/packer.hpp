// From histories and branches to what the trainer reads: positions without padding, and the trie nodes of seen items.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "shard.hpp"

namespace negfast {

constexpr uint8_t kStart = 4;  // feedback of the position that starts a history
constexpr int kGaps = 24;      // buckets of the time since the event before

struct PackHistories {
  std::span<const int32_t> users;  // [B]
  const int64_t* first;            // [B] first event, counted within the user's events
  const uint8_t* views;            // [B] bit 0: likes shown, bit 1: dislikes shown, both: all events shown
};

struct PackBranches {
  std::span<const int32_t> history;  // [A] ascending
  const int64_t* moments;            // [A] seconds; events before this are seen
};

struct ItemNodes {
  const int32_t* nodes;  // [items, levels] numbered in lexicographic order in every level
  uint64_t items;
  int levels;
};

// The nodes of one level above (or at) the seen items of each request, ordered by (request, node).
struct SeenLevel {
  std::vector<int32_t> node, request, count;  // [M]
  std::vector<int32_t> slot;                  // [S] where in those a seen item's node is
};

struct Packed {
  std::vector<int32_t> item;           // [T] -1 at a start
  std::vector<uint8_t> feedback, gap;  // [T]
  std::vector<int32_t> cu_seqlens;     // [B + 1]
  std::vector<int32_t> prefix;         // [A] positions of its history that a branch sees
  std::vector<uint8_t> branch_gap;     // [A]
  std::vector<int32_t> seen_item;      // [S] distinct items of the user before the moment, increasing within a branch
  std::vector<int32_t> seen_cu;        // [A + 1]
  std::vector<SeenLevel> seen;         // [levels]
};

// Room for a Packed in memory of the caller's.
struct PackedRoom {
  struct Level {
    std::span<int32_t> node, request, count, slot;
  };
  std::span<int32_t> item;
  std::span<uint8_t> feedback, gap;
  std::span<int32_t> cu_seqlens, prefix;
  std::span<uint8_t> branch_gap;
  std::span<int32_t> seen_item, seen_cu;
  std::vector<Level> seen;
};

// Packed histories, in the parts that tasks made of them: how large they are is known before they are put together.
class PackedParts {
 public:
  PackedParts(std::vector<Packed> parts, int levels);

  uint64_t histories() const { return histories_; }
  uint64_t positions() const { return positions_; }
  uint64_t branches() const { return branches_; }
  uint64_t seen() const { return seen_; }
  const std::vector<uint64_t>& nodes() const { return nodes_; }  // of every level

  // Throws ShardError where the room has not exactly these sizes.
  void write(const PackedRoom& room, unsigned threads) const;

 private:
  std::vector<Packed> parts_;
  uint64_t histories_ = 0, positions_ = 0, branches_ = 0, seen_ = 0;
  std::vector<uint64_t> nodes_;
};

// Throws ShardError for histories, branches or nodes that do not fit the shard or each other, and for a damaged shard.
PackedParts pack(const Shard& shard, const PackHistories& histories, const PackBranches& branches,
                 const ItemNodes& item_nodes, unsigned threads);

}  // namespace negfast
