// What likes and dislikes say of a user and an item beyond their rates, kept up to date event by event.
//
// r = dislike - what the rates of user and item led to expect at the time. A user's sketch s_u = sum r_uj g_j over the
// items j it judged, g_j random signs; an item's t_i = sum r_vi s_v over those who judged it. Then <s_u, t_i> estimates
// the sum over others v of r_vi times <what u said, what v said>, the numerator of a user-user neighbourhood (AMS
// sketch, Alon, Matias and Szegedy 1996). The same with users and items exchanged: how u judged items judged alike.
// Beside it a factorisation r_ui ~ <p_u, q_i> by stochastic gradients, one step an event. Memory is linear in users +
// items, time linear in events.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace negfast {

constexpr size_t kSketch = 128;   // numbers of a sketch
constexpr size_t kText = 32;      // numbers of an item's text vector
constexpr size_t kRidge = 16;     // the first of them, which the ridge regression sees
constexpr size_t kRecent = 32;    // a user's last judgements, compared by text
constexpr size_t kEvidence = 18;  // columns of an answer

// Likes, dislikes and withdrawals in order of time.
struct EvidenceEvents {
  std::span<const int32_t> user, item;
  std::span<const int64_t> time;  // seconds
  std::span<const uint8_t> feedback;
  std::span<const int64_t> earlier;  // row of the user's event before on the same item, -1 where there is none
};

struct EvidenceItems {
  size_t users, items, cells;
  const float* text;    // [items, kText], unit vectors or zeros
  const int32_t* cell;  // [items, 2], a coarse and a fine group of items of like text, in [0, cells)
  double prior;         // dislike rate of all
};

// In order of moment.
struct EvidenceQuestions {
  std::span<const int32_t> user, item;
  std::span<const int64_t> moment;  // seconds
};

// Answers float [questions, kEvidence], each from the events before its moment. Events of one second do not see each
// other.
void evidence(const EvidenceEvents& events, const EvidenceItems& about, const EvidenceQuestions& questions, float* out);

}  // namespace negfast
