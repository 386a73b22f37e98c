#include "evidence.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

// The same bits on every CPU: always 16 lanes, in however many registers, and no fused multiply-add (CMakeLists.txt).
#if defined(__x86_64__) && defined(__gnu_linux__)
#define NEGFAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define NEGFAST_CLONES
#endif
#define NEGFAST_INLINE inline __attribute__((always_inline))

namespace negfast {
namespace {

constexpr size_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Bits __attribute__((vector_size(kLanes * sizeof(int32_t))));

constexpr uint8_t kDislike = 2, kWithdrawn = 3;
constexpr int64_t kNever = std::numeric_limits<int64_t>::min();
constexpr double kDay = 86'400;
constexpr double kPseudoEvents = 5, kCellPseudoEvents = 3;  // at the prior rate, mixed into a mean
constexpr float kPairWeight = 0.5f, kTextWeight = 0.3f;     // added to the weights that a mean is divided by
constexpr float kPenalty = 2;                               // of the ridge regression
constexpr float kStep = 0.4f, kShrink = 0.003f, kStart = 0.2f;  // of the factorisation; kStart: range of first factors
constexpr float kLately = 0.15f, kLatelyAll = 0.005f;       // weight of the newest event in a running mean
constexpr size_t kAhead = 4;                                // events whose memory is fetched early

template <size_t width>
struct alignas(64) Vector {
  static_assert(width % kLanes == 0);
  Lanes part[width / kLanes] = {};
};
using Sketch = Vector<kSketch>;
using Text = Vector<kText>;

struct User {
  Sketch sketch, taste;   // s_u; sum r_uj times the sketch of item j
  Lanes inverse[kRidge];  // of the ridge regression's Gram matrix
  Lanes weights = {};     // of the ridge regression
  Lanes factors;          // p_u
  int32_t item[kRecent];
  float residual[kRecent];
  uint64_t judged = 0;  // `item` and `residual` hold the last of so many
  float weight = 0;     // sum |r_uj| |sketch of j|
  float lately;
  int64_t last = kNever, last_dislike = kNever;
  double count = 0, dislikes = 0;
};

struct Item {
  Sketch sketch, opinion;  // sum r_vi h_v, h_v the signs of user v; t_i
  Lanes factors;           // q_i
  float weight = 0;        // sum |r_vi| |s_v|
  float lately;
  int64_t first = kNever;
  double count = 0, dislikes = 0;
};

struct Cell {
  double count = 0, excess = 0;
};

// What an event says, as a change to what its user's earlier event on the item said.
struct Change {
  int32_t user, item;
  int64_t time;
  float residual;
  double judged, dislikes;
  bool is_first, is_judged, is_dislike;
};

NEGFAST_INLINE float sum(const Lanes& lanes) {
  float out = 0;
  for (size_t l = 0; l < kLanes; ++l) out += lanes[l];
  return out;
}

template <size_t width>
NEGFAST_INLINE float dot(const Vector<width>& a, const Vector<width>& b) {
  Lanes total = a.part[0] * b.part[0];
  for (size_t p = 1; p < width / kLanes; ++p) total += a.part[p] * b.part[p];
  return sum(total);
}

NEGFAST_INLINE float length(const Sketch& sketch) { return std::sqrt(dot(sketch, sketch)); }

NEGFAST_INLINE void add(Sketch& to, float scale, const Sketch& what) {
  for (size_t p = 0; p < kSketch / kLanes; ++p) to.part[p] += scale * what.part[p];
}

NEGFAST_INLINE uint64_t mixed(uint64_t x) {  // SplitMix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Adds random signs over sqrt(kSketch), made of a number alone: users and items that come later change none.
NEGFAST_INLINE void add_signs(Sketch& to, float scale, uint64_t number) {
  Bits lane;
  for (size_t l = 0; l < kLanes; ++l) lane[l] = static_cast<int32_t>(l);
  const float size = scale / std::sqrt(static_cast<float>(kSketch));
  for (size_t p = 0; p < kSketch / kLanes; ++p) {
    const auto bits = static_cast<int32_t>(mixed(number * (kSketch / kLanes) + p) >> 32);
    to.part[p] += ((bits >> lane) & 1) != 0 ? Lanes{} - size : Lanes{} + size;
  }
}

// First factors: small random numbers, made of a number alone.
inline void start(Lanes& factors, uint64_t number) {
  for (size_t l = 0; l < kLanes; ++l) {
    const auto bits = static_cast<float>(mixed(~(number * kLanes + l)) >> 40);  // below 2^24
    factors[l] = kStart * (bits / 16'777'216 - 0.5f);
  }
}

NEGFAST_INLINE double logit_rate(double count, double dislikes, double prior) {
  const double rate = (dislikes + kPseudoEvents * prior) / (count + kPseudoEvents);
  return std::log(rate / (1 - rate));
}

NEGFAST_INLINE float days(int64_t since, int64_t until) {
  return since == kNever ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>((until - since) / kDay);
}

template <class T>
NEGFAST_INLINE void fetch(const T& what) {
  for (size_t at = 0; at < sizeof(T); at += 64) __builtin_prefetch(reinterpret_cast<const char*>(&what) + at, 1);
}

class State {
 public:
  explicit State(const EvidenceItems& about)
      : about_(about),
        prior_logit_(std::log(about.prior / (1 - about.prior))),
        users_(about.users),
        items_(about.items),
        text_(about.items),
        cells_(about.cells),
        lately_(static_cast<float>(about.prior)) {
    for (size_t u = 0; u < about.users; ++u) {
      User& user = users_[u];
      start(user.factors, 2 * u + 1);
      for (size_t f = 0; f < kRidge; ++f) {
        user.inverse[f] = Lanes{};
        user.inverse[f][f] = 1 / kPenalty;
      }
      user.lately = lately_;
    }
    for (size_t i = 0; i < about.items; ++i) {
      start(items_[i].factors, 2 * i);
      items_[i].lately = lately_;
      for (size_t f = 0; f < kText; ++f) text_[i].part[f / kLanes][f % kLanes] = about.text[i * kText + f];
    }
  }

  NEGFAST_INLINE void fetch_early(int32_t user, int32_t item) const {
    fetch(users_[user]);
    fetch(items_[item]);
  }

  // The probability of a dislike by the rates of user and item.
  NEGFAST_INLINE float expected(int32_t u, int32_t i) const {
    const double of_user = logit_rate(users_[u].count, users_[u].dislikes, about_.prior);
    const double of_item = logit_rate(items_[i].count, items_[i].dislikes, about_.prior);
    return static_cast<float>(1 / (1 + std::exp(prior_logit_ - of_user - of_item)));
  }

  NEGFAST_INLINE void answer(int32_t u, int32_t i, int64_t moment, float* out) const {
    const User& user = users_[u];
    const Item& item = items_[i];
    by_pairs(dot(user.sketch, item.opinion), length(user.sketch), length(item.opinion), item.weight, out);
    by_pairs(dot(item.sketch, user.taste), length(item.sketch), length(user.taste), user.weight, out + 3);
    out[6] = sum(user.factors * item.factors);
    float total = 0, weight = 0;
    for (size_t k = 0; k < std::min<uint64_t>(user.judged, kRecent); ++k) {
      const float cosine = std::max(dot(text_[i], text_[user.item[k]]), 0.0f), kernel = cosine * cosine * cosine;
      total += kernel * user.residual[k];
      weight += kernel;
    }
    out[7] = total / (weight + kTextWeight);
    out[8] = weight;
    out[9] = sum(user.weights * text_[i].part[0]);
    for (size_t level = 0; level < 2; ++level) {
      const Cell& cell = cells_[about_.cell[2 * i + level]];
      out[10 + level] = static_cast<float>(cell.excess / (cell.count + kCellPseudoEvents));
    }
    out[12] = user.lately;
    out[13] = item.lately;
    out[14] = lately_;
    out[15] = days(user.last, moment);
    out[16] = days(user.last_dislike, moment);
    out[17] = days(item.first, moment);
  }

  NEGFAST_INLINE void learn(const Change& change) {
    User& user = users_[change.user];
    Item& item = items_[change.item];
    const float r = change.residual;
    item.weight += std::abs(r) * length(user.sketch);
    user.weight += std::abs(r) * length(item.sketch);
    add(item.opinion, r, user.sketch);
    add(user.taste, r, item.sketch);
    add_signs(user.sketch, r, 2 * static_cast<uint64_t>(change.item));
    add_signs(item.sketch, r, 2 * static_cast<uint64_t>(change.user) + 1);
    if (change.is_first) {
      regress(user, text_[change.item].part[0], r);
      factorise(user.factors, item.factors, r);
    }
    user.item[user.judged % kRecent] = change.item;
    user.residual[user.judged++ % kRecent] = r;
    user.count += change.judged;
    item.count += change.judged;
    user.dislikes += change.dislikes;
    item.dislikes += change.dislikes;
    for (size_t level = 0; level < 2; ++level) {
      Cell& cell = cells_[about_.cell[2 * change.item + level]];
      cell.count += change.judged;
      cell.excess += change.dislikes - about_.prior * change.judged;
    }
    if (!change.is_judged) return;
    const auto label = static_cast<float>(change.is_dislike);
    user.lately += kLately * (label - user.lately);
    item.lately += kLately * (label - item.lately);
    lately_ += kLatelyAll * (label - lately_);
    user.last = change.time;
    if (change.is_dislike) user.last_dislike = change.time;
    if (item.first == kNever) item.first = change.time;
  }

 private:
  NEGFAST_INLINE static void by_pairs(float total, float a, float b, float weight, float* out) {
    out[0] = total;
    out[1] = total / (a * b + 1e-3f);
    out[2] = total / (a * weight + kPairWeight);
  }

  // Recursive least squares: Sherman and Morrison's update of the inverse.
  NEGFAST_INLINE static void regress(User& user, const Lanes& x, float residual) {
    Lanes gain;
    for (size_t f = 0; f < kRidge; ++f) gain[f] = sum(user.inverse[f] * x);
    const float scale = 1 / (1 + std::max(sum(gain * x), 0.0f));
    user.weights += gain * (scale * (residual - sum(user.weights * x)));
    for (size_t f = 0; f < kRidge; ++f) user.inverse[f] -= gain[f] * gain * scale;
  }

  // One implicit gradient step, which cannot overshoot (Kulis and Bartlett 2010).
  NEGFAST_INLINE static void factorise(Lanes& p, Lanes& q, float residual) {
    const float error = residual - sum(p * q), curvature = sum(p * p) + sum(q * q);
    const float step = kStep * error / (1 + kStep * curvature);
    const Lanes before = p;
    p += step * q - kStep * kShrink * p;
    q += step * before - kStep * kShrink * q;
  }

  const EvidenceItems& about_;
  const double prior_logit_;
  std::vector<User> users_;
  std::vector<Item> items_;
  std::vector<Text> text_;
  std::vector<Cell> cells_;
  float lately_;  // of all events
};

}  // namespace

NEGFAST_CLONES
void evidence(const EvidenceEvents& events, const EvidenceItems& about, const EvidenceQuestions& questions,
              float* out) {
  State state(about);
  const size_t n = events.user.size(), asked = questions.user.size();
  std::vector<float> expected(n), residual(n);  // of every event
  size_t next = 0;                              // question
  for (size_t start = 0, end = 0; next < asked; start = end) {
    for (; next < asked && (start == n || questions.moment[next] <= events.time[start]); ++next)
      state.answer(questions.user[next], questions.item[next], questions.moment[next], out + next * kEvidence);
    for (; end < n && events.time[end] == events.time[start]; ++end) {
      const int64_t before = events.earlier[end];
      expected[end] = before >= 0 ? expected[before] : state.expected(events.user[end], events.item[end]);
      const bool judged = events.feedback[end] != kWithdrawn, disliked = events.feedback[end] == kDislike;
      residual[end] = judged ? static_cast<float>(disliked) - expected[end] : 0;
    }
    for (size_t k = start; k < end; ++k) {
      if (k + kAhead < n) state.fetch_early(events.user[k + kAhead], events.item[k + kAhead]);
      const int64_t before = events.earlier[k];
      const bool judged = events.feedback[k] != kWithdrawn, disliked = events.feedback[k] == kDislike;
      const bool judged_before = before >= 0 && events.feedback[before] != kWithdrawn;
      const bool disliked_before = before >= 0 && events.feedback[before] == kDislike;
      state.learn({events.user[k], events.item[k], events.time[k], residual[k] - (before >= 0 ? residual[before] : 0),
                   static_cast<double>(judged) - judged_before, static_cast<double>(disliked) - disliked_before,
                   before < 0 && judged, judged, disliked});
    }
  }
}

}  // namespace negfast
