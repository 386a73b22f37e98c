#include "requests.hpp"

#include <algorithm>
#include <bit>
#include <limits>
#include <vector>

#include "model.hpp"

namespace negfast {
namespace {

constexpr uint8_t kLike = 1, kDislike = 2;
constexpr uint32_t kDay = 86'400, kNever = std::numeric_limits<uint32_t>::max();
constexpr int32_t kEmpty = -1;

// An item of one user; requests count from the user's first.
struct Seen {
  int32_t item;
  uint32_t first;    // the first request that has seen it
  uint32_t dislike;  // the first request whose horizon reaches its first dislike
};

Seen& seen_item(std::vector<Seen>& slots, int32_t item) {
  size_t slot = static_cast<uint32_t>(item) * 0x9E3779B97F4A7C15u >> 32;
  do slot = (slot + 1) & (slots.size() - 1);
  while (slots[slot].item != item && slots[slot].item != kEmpty);
  return slots[slot];
}

}  // namespace

size_t request_days(std::span<const int64_t> offsets, const int32_t* item, const uint8_t* feedback,
                    const int64_t* time, int64_t horizon, int64_t* user, int64_t* day, uint8_t* ahead) {
  size_t found = 0;
  std::vector<Seen> slots;
  std::vector<int32_t> dislikes, likes;  // pairs that come ahead with a request, less those that no longer are
  auto count = [](std::vector<int32_t>& pairs, uint32_t begin, uint32_t end) {
    if (begin >= end) return;
    ++pairs[begin];
    --pairs[end];
  };
  for (size_t u = 0; u + 1 < offsets.size(); ++u) {
    const int64_t begin = offsets[u], end = offsets[u + 1];
    int64_t* days = day + found;
    uint32_t requests = 0, reach = 0;
    slots.assign(std::bit_ceil(2 * static_cast<size_t>(end - begin) + 1), Seen{kEmpty, 0, kNever});
    dislikes.assign(end - begin + 1, 0);
    likes.assign(end - begin + 1, 0);
    for (int64_t e = begin; e < end; ++e) {
      const int64_t today = to_units(time[e], kDay);
      if (requests == 0 || days[requests - 1] != today) days[requests++] = today;
      Seen& seen = seen_item(slots, item[e]);
      if (seen.item == kEmpty) seen = {item[e], requests - 1, kNever};
      if (feedback[e] != kDislike || seen.dislike != kNever) continue;
      while (days[reach] < today - horizon) ++reach;
      seen.dislike = reach;
      count(dislikes, reach, seen.first);
    }
    reach = 0;
    for (int64_t e = begin; e < end; ++e) {  // whether a like counts depends on a later dislike
      if (feedback[e] != kLike) continue;
      Seen& seen = seen_item(slots, item[e]);
      while (days[reach] < to_units(time[e], kDay) - horizon) ++reach;
      count(likes, reach, std::min(seen.first, seen.dislike));
      seen.first = 0;  // later likes do not count
    }
    int32_t disliked = 0, liked = 0;
    for (uint32_t r = 0; r < requests; ++r, ++found) {
      disliked += dislikes[r];
      liked += likes[r];
      user[found] = static_cast<int64_t>(u);
      ahead[found] = (disliked > 0 ? kDislikesAhead : 0) | (liked > 0 ? kLikesAhead : 0);
    }
  }
  return found;
}

}  // namespace negfast
