// The requests of a log, one for each user and day with events, and whether dislikes and likes lie ahead of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace negfast {

constexpr uint8_t kDislikesAhead = 1, kLikesAhead = 2;  // F_AHEAD, P_AHEAD of negfast.data.split

// Writes the user, the day (since 1970) and what lies ahead of every request in the order of both, and returns their
// number; there is room for one an event. Offsets [users + 1] tell each user's events, which are in order of time
// (seconds); the horizon counts days. What is ahead is defined in negfast.data.split.
size_t request_days(std::span<const int64_t> offsets, const int32_t* item, const uint8_t* feedback,
                    const int64_t* time, int64_t horizon, int64_t* user, int64_t* day, uint8_t* ahead);

}  // namespace negfast
