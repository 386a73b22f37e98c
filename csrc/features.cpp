#include "features.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "containers.hpp"
#include "lanes.hpp"
#include "portable_math.hpp"

// The same bits on every CPU: always 16 lanes, in however many registers, sums in one order, no fused multiply-add
// (CMakeLists.txt), and log and exp2 of our own (portable_math.hpp), as those of libm depend on the CPU.

namespace negfast {
namespace {

constexpr size_t kJudgements = 128;  // of a user that are kept, the last ones
constexpr size_t kJudges = 256;      // of an item that are kept, the last ones
constexpr size_t kRidge = 8;         // text numbers that the ridge regression sees, the first
constexpr size_t kRecent = 32;       // a user's last judgements, compared by text
constexpr size_t kEvidence = 14, kDeviations = 6, kRates = 4, kValues = 3;  // columns

constexpr uint8_t kExposed = 0, kDislike = 2, kWithdrawn = 3;
constexpr int64_t kNever = std::numeric_limits<int64_t>::min();
constexpr double kDay = 86'400;
constexpr float kUnknown = std::numeric_limits<float>::quiet_NaN();
constexpr double kRecentPseudoEvents = 3, kCellPseudoEvents = 3;  // the same, of recent means and of cells
constexpr double kHalfLife = 30 * kDay, kCountHalfLife = 2 * kDay;  // of recent deviations and of the recent count
constexpr float kAlikeWeight = 0.5f, kTextWeight = 0.3f;            // added to the weights that a mean is divided by
constexpr float kAlikeLength = 0.5f;                                // added to the lengths that a cosine is divided by
constexpr float kPenalty = 2;                                       // of the ridge regression
constexpr float kStep = 0.4f, kShrink = 0.003f, kStart = 0.2f;      // of the factorisation; kStart: range at first
constexpr float kLately = 0.15f, kLatelyAll = 0.005f;               // weight of the newest event in a running mean
constexpr size_t kAhead = 4;                                        // events whose memory is fetched early

// What holds lanes says its alignment: where the compiler's target is narrower than a clone's it would take less.
struct alignas(64) Text {
  Lanes part[kText / kLanes] = {};
};

// Counts of a kind are of its user's and item's events that the kind knows: all for dislikes, those with a value for
// values. `excess` sums how far events were above what was to be expected.
struct Deviation {
  double excess = 0;
  double absolute = 0;                       // of users: sum of |excess|
  float recent_count = 0, recent_excess = 0;  // decayed, as of `Sums::at`
};

struct Sums {
  double count = 0, dislikes = 0;                    // of pairs, by their last feedback
  double value_count = 0, value = 0, value_square = 0;
  Deviation dislike, of_value;
  float recent_events = 0;  // of users: decayed, as of `at`
  float lately;             // running mean of dislikes
  int64_t at = kNever;      // the moment that decayed sums hold at
};

struct Judgement {
  int32_t other;  // of a user: the item, ~item where it is not the first of its pair; of an item: the user
  float residual;
};

struct alignas(64) User {
  Lanes factors;  // p_u
  Last<Judgement, kJudgements> judgements;
  float square = 0;  // sum of all r_uj^2
  Sums sums;
  int64_t last = kNever, last_dislike = kNever;
};

struct alignas(64) Item {
  Lanes factors;  // q_i
  Last<Judgement, kJudges> judges;
  Sums sums;
  int64_t first = kNever;
};

// A user beside the one asked about.
struct alignas(16) Alike {
  float product = 0;      // of the residuals of both, where `question` is the present one
  uint32_t question = 0;
  float length = 0;       // of this user's residuals
};

struct Cell {
  double count = 0, excess = 0;
};

struct Value {
  int32_t count = 0, dislikes = 0;
  int32_t column;
  float content;
};

struct Event {
  int32_t user, item;
  int64_t time;
  float value;
  uint8_t feedback;
};

// A field of a row, as a table shows it; vectors are floats.
struct Field {
  const char* name;
  char type;
  size_t width, offset, bytes;
};

template <class T>
constexpr Field field(const char* name, size_t offset) {
  using Number = std::remove_all_extents_t<T>;
  if constexpr (std::is_same_v<Number, double>) return {name, 'd', sizeof(T) / sizeof(double), offset, sizeof(T)};
  if constexpr (std::is_same_v<Number, int32_t>) return {name, 'i', sizeof(T) / sizeof(int32_t), offset, sizeof(T)};
  if constexpr (std::is_integral_v<Number>) return {name, 'q', sizeof(T) / sizeof(int64_t), offset, sizeof(T)};
  return {name, 'f', sizeof(T) / sizeof(float), offset, sizeof(T)};
}

#define NEGFAST_FIELD(Row, path) \
  field<std::remove_reference_t<decltype((std::declval<Row&>().path))>>(#path, offsetof(Row, path))
#define NEGFAST_DEVIATION(Row, path)                                        \
  NEGFAST_FIELD(Row, path.excess), NEGFAST_FIELD(Row, path.absolute),       \
      NEGFAST_FIELD(Row, path.recent_count), NEGFAST_FIELD(Row, path.recent_excess)
#define NEGFAST_SUMS(Row)                                                                                        \
  NEGFAST_FIELD(Row, sums.count), NEGFAST_FIELD(Row, sums.dislikes), NEGFAST_FIELD(Row, sums.value_count),      \
      NEGFAST_FIELD(Row, sums.value), NEGFAST_FIELD(Row, sums.value_square), NEGFAST_DEVIATION(Row, sums.dislike), \
      NEGFAST_DEVIATION(Row, sums.of_value), NEGFAST_FIELD(Row, sums.recent_events),                            \
      NEGFAST_FIELD(Row, sums.lately), NEGFAST_FIELD(Row, sums.at)

constexpr Field kUserFields[] = {NEGFAST_FIELD(User, factors), NEGFAST_FIELD(User, square), NEGFAST_SUMS(User),
                                 NEGFAST_FIELD(User, last), NEGFAST_FIELD(User, last_dislike)};
constexpr Field kItemFields[] = {NEGFAST_FIELD(Item, factors), NEGFAST_SUMS(Item), NEGFAST_FIELD(Item, first)};
constexpr Field kCellFields[] = {NEGFAST_FIELD(Cell, count), NEGFAST_FIELD(Cell, excess)};
constexpr Field kValueFields[] = {NEGFAST_FIELD(Value, count), NEGFAST_FIELD(Value, dislikes),
                                  NEGFAST_FIELD(Value, column), NEGFAST_FIELD(Value, content)};

// What an event says, as a change to what its user's earlier event on the item said, and what was expected of it.
struct Change {
  int32_t judged, dislikes;
  double value_count, value, value_square;
  float residual;
  double item_mean, user_mean, item_value, user_value;
  bool is_first;
};

NEGFAST_INLINE float dot(const Text& a, const Text& b) {
  Lanes total = a.part[0] * b.part[0];
  for (size_t p = 1; p < kText / kLanes; ++p) total += a.part[p] * b.part[p];
  return sum(total);
}

// Where the random numbers of a user (an item) with this key begin.
NEGFAST_INLINE uint64_t seed(uint64_t key, bool is_user) { return mixed(2 * key + is_user); }

NEGFAST_INLINE Lanes first_factors(uint64_t seed) {
  Lanes out;
  for (size_t l = 0; l < kLanes; ++l) {
    const auto bits = static_cast<float>(mixed(~(seed + l)) >> 40);  // below 2^24
    out[l] = kStart * (bits / 16'777'216 - 0.5f);
  }
  return out;
}

NEGFAST_INLINE float days(int64_t since, int64_t until) {
  return since == kNever ? kUnknown : static_cast<float>(static_cast<double>(until - since) / kDay);
}

template <class T>
NEGFAST_INLINE void fetch(const T* what) {
  for (size_t at = 0; at < sizeof(T); at += 64) __builtin_prefetch(reinterpret_cast<const char*>(what) + at, 1);
}

struct Counts {
  int32_t count = 0, dislikes = 0;
};

NEGFAST_INLINE double mean(double total, double count, double prior, double pseudo_events) {
  return (total + pseudo_events * prior) / (count + pseudo_events);
}

NEGFAST_INLINE float logit(double rate) {
  rate = std::min(std::max(rate, 1e-6), 1 - 1e-6);
  return static_cast<float>(logarithm(rate / (1 - rate)));
}

// The standard deviation of the values, unknown for fewer than two.
NEGFAST_INLINE float spread(const Sums& sums) {
  if (sums.value_count < 2) return kUnknown;
  const double mean = sums.value / sums.value_count;
  return static_cast<float>(std::sqrt(std::max(sums.value_square / sums.value_count - mean * mean, 0.0)));
}

// A user or an item as far as columns tell of it alone.
struct Side {
  float logit_rate, log_count, mean_value, spread, deviation[2], recent[2];
};

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

}  // namespace

class FeatureState {
 public:
  explicit FeatureState(const FeatureSettings& settings)
      : settings_(settings),
        prior_(std::min(std::max(settings.prior_rate, 1e-6), 1 - 1e-6)),
        said_(settings.has_values),
        by_user_value_(true),
        lately_(static_cast<float>(prior_)) {
    unknown_user_.sums.lately = unknown_item_.sums.lately = lately_;
    width_ = kRates + kEvidence + kDeviations + 1;
    if (settings.has_values) width_ += kValues + kDeviations + 1;
    for (const auto& attribute : settings.attributes) width_ += 2 + attribute.columns;
  }

  // ---- Growth.

  void add_users(std::span<const uint64_t> keys) {
    user_key_.insert(user_key_.end(), keys.begin(), keys.end());
    users_.grow(keys.size());
    alike_.resize(users_.size());
  }

  void add_values(std::span<const int32_t> column, std::span<const float> content) {
    for (size_t k = 0; k < column.size(); ++k) values_.push_back({0, 0, column[k], content[k]});
  }

  void add_items(const FeatureItems& more) {
    const size_t n = more.key.size();
    for (size_t k = 0; k < 2 * n; ++k)
      if (more.cell[k] < 0) refuse("cells: found a negative one");
    for (size_t k = 0; k < more.value_start.size(); ++k) {
      const int64_t before = k == 0 ? 0 : more.value_start[k - 1];
      if (more.value_start[k] < before || more.value_start[k] > static_cast<int64_t>(more.value.size()))
        refuse("value_start: expected places in the values, ascending");
    }
    for (const int32_t value : more.value)
      if (value < 0 || static_cast<size_t>(value) >= values_.size())
        refuse("attribute value " + std::to_string(value) + ": expected below " + std::to_string(values_.size()));
    item_key_.insert(item_key_.end(), more.key.begin(), more.key.end());
    items_.grow(n);
    for (size_t k = 0; k < n; ++k) {
      Text text;
      std::memcpy(&text, more.text + k * kText, sizeof text);
      text_.push_back(text);
      cell_.push_back({more.cell[2 * k], more.cell[2 * k + 1]});
      for (const int32_t cell : cell_.back())
        if (static_cast<size_t>(cell) >= cells_.size()) cells_.resize(static_cast<size_t>(cell) + 1);
    }
    const auto first = static_cast<int64_t>(value_.size());
    if (value_start_.empty()) value_start_.push_back(0);
    for (size_t k = 1; k < more.value_start.size(); ++k) value_start_.push_back(first + more.value_start[k]);
    value_.insert(value_.end(), more.value.begin(), more.value.end());
  }

  // ---- Checks.

  int64_t moment(int64_t time) const {
    const int64_t into = time % settings_.unit;
    return time - into - (into < 0 ? settings_.unit : 0);
  }

  void check(int32_t user, int32_t item) const {
    if (user < 0 || static_cast<size_t>(user) >= users_.size())
      refuse("user " + std::to_string(user) + ": expected below " + std::to_string(users_.size()));
    if (item < 0 || static_cast<size_t>(item) >= items_.size())
      refuse("item " + std::to_string(item) + ": expected below " + std::to_string(items_.size()));
  }

  void check_event(int32_t user, int32_t item, int64_t time, uint8_t feedback) const {
    check(user, item);
    if (feedback > kWithdrawn) refuse("feedback " + std::to_string(feedback) + ": expected 0 to 3");
    const int64_t newest = newest_moment();
    if (moment(time) < newest || moment(time) == learned_)
      refuse("event at " + std::to_string(time) + ": older than what was learned, up to " + std::to_string(newest));
  }

  void check_moment(int64_t asked) const {
    if (asked <= learned_)
      refuse("asked at " + std::to_string(asked) + ": events of " + std::to_string(learned_) + " are learned");
  }

  int64_t newest_moment() const { return pending_.empty() ? learned_ : moment(pending_[0].time); }

  // ---- Events.

  NEGFAST_INLINE void push(const Event& event) {
    if (event.feedback == kExposed) return;
    if (!pending_.empty() && moment(event.time) != moment(pending_[0].time)) learn_pending();
    pending_.push_back(event);
  }

  NEGFAST_INLINE void learn_before(int64_t asked) {
    if (!pending_.empty() && moment(pending_[0].time) < asked) learn_pending();
  }

  NEGFAST_INLINE void fetch_early(int32_t user, int32_t item) {
    if (User* of_user = users_.find(user)) fetch(of_user);
    if (Item* of_item = items_.find(item)) fetch(of_item);
    said_.fetch_early(said_.key(user, item));
    const size_t attributes = settings_.attributes.size();
    for (int64_t k = value_start_[item * attributes]; k < value_start_[(item + 1) * attributes]; ++k)
      by_user_value_.fetch_early(by_user_value_.key(user, value_[k]));
  }

  size_t waiting() const { return pending_.size(); }

  // ---- Answers.

  // A user at a moment.
  struct alignas(64) Asked {
    const User* user;
    int32_t number;
    int64_t moment;
    Side side;
    Lanes ridge;  // the weights twice
    float off[2], recent_events, length, last, last_dislike;
  };

  NEGFAST_INLINE void ask(Asked& asked, int32_t number, int64_t moment) {
    const User* user = &known_user(number);
    asked.user = user;
    asked.number = number;
    asked.moment = moment;
    const Sums& sums = user->sums;
    asked.side = side(sums, moment);
    asked.off[0] = static_cast<float>(sums.dislike.absolute / (sums.count + 1));
    asked.off[1] = static_cast<float>(sums.of_value.absolute / (sums.value_count + 1));
    const float events =
        sums.at == kNever ? 0 : std::max(sums.recent_events * left(moment - sums.at, kCountHalfLife), 0.0f);
    asked.recent_events = static_cast<float>(logarithm(1 + static_cast<double>(events)));
    compare(*user);
    asked.ridge = ridge(*user);
    asked.length = alike_[number].length;
    asked.last = days(user->last, moment);
    asked.last_dislike = days(user->last_dislike, moment);
  }

  NEGFAST_INLINE void answer(const Asked& asked, int32_t i, float* out) {
    const User& user = *asked.user;
    const Item& item = known_item(i);
    const Side of_user = asked.side, of_item = side(item.sums, asked.moment);
    *out++ = of_item.logit_rate;
    *out++ = of_user.logit_rate;
    *out++ = of_item.log_count;
    *out++ = of_user.log_count;
    if (settings_.has_values) {
      *out++ = of_item.mean_value;
      *out++ = of_user.mean_value;
      *out++ = of_user.spread;
    }
    out = of_attributes(asked.number, i, out);
    for (size_t kind = 0; kind < 1 + settings_.has_values; ++kind) {
      *out++ = of_user.deviation[kind];
      *out++ = of_item.deviation[kind];
      *out++ = of_user.deviation[kind] + of_item.deviation[kind];
      *out++ = of_user.recent[kind];
      *out++ = of_item.recent[kind];
      *out++ = asked.off[kind];
    }
    *out++ = asked.recent_events;
    float total = 0, weight = 0;
    for (size_t k = 0; k < item.judges.size(); ++k) {
      const int32_t judge = item.judges[k].other;
      const Alike& alike = alike_[judge];
      if (alike.question != question_ || judge == asked.number) continue;
      const float cosine = alike.product / (asked.length * alike.length + kAlikeLength);
      total += cosine * item.judges[k].residual;
      weight += std::abs(cosine);
    }
    out[0] = total;
    out[1] = total / (weight + kAlikeWeight);
    out[2] = sum(user.factors * item.factors);
    const Text& text = text_[i];
    total = weight = 0;
    const size_t judged = user.judgements.size();
    for (size_t k = judged - std::min(judged, kRecent); k < judged; ++k) {
      const float cosine = std::max(dot(text, text_[number(user.judgements[k])]), 0.0f);
      const float kernel = cosine * cosine * cosine;
      total += kernel * user.judgements[k].residual;
      weight += kernel;
    }
    out[3] = total / (weight + kTextWeight);
    out[4] = weight;
    out[5] = sum(asked.ridge * twice(text)) / 2;
    for (size_t level = 0; level < 2; ++level) {
      const Cell& cell = cells_[cell_[i][level]];
      out[6 + level] = static_cast<float>(cell.excess / (cell.count + kCellPseudoEvents));
    }
    out[8] = user.sums.lately;
    out[9] = item.sums.lately;
    out[10] = lately_;
    out[11] = asked.last;
    out[12] = asked.last_dislike;
    out[13] = days(item.first, asked.moment);
    if (settings_.has_values) out[14] = spread(item.sums);
  }

  const FeatureSettings& settings() const { return settings_; }
  size_t width() const { return width_; }
  size_t users() const { return users_.size(); }
  size_t items() const { return items_.size(); }

  size_t bytes() const {
    const size_t of_items = item_key_.capacity() * (sizeof(uint64_t) + sizeof(Text) + sizeof(cell_[0])) +
                            value_start_.capacity() * sizeof(int64_t) + value_.capacity() * sizeof(int32_t);
    const size_t judgements = users_.sum([](const User& user) { return user.judgements.bytes(); }) +
                              items_.sum([](const Item& item) { return item.judges.bytes(); });
    return users_.bytes() + items_.bytes() + judgements + said_.bytes() + by_user_value_.bytes() + of_items +
           user_key_.capacity() * sizeof(uint64_t) + alike_.capacity() * sizeof(Alike) +
           values_.capacity() * sizeof(Value) + cells_.capacity() * sizeof(Cell);
  }

  // ---- The state as tables.

  void tables(const std::function<void*(const FeatureTable&)>& place) {
    if (!pending_.empty()) learn_pending();
    copy("user.", kUserFields, users(), place, [this](size_t k) { return &known_user(static_cast<int32_t>(k)); });
    copy("item.", kItemFields, items(), place, [this](size_t k) { return &known_item(static_cast<int32_t>(k)); });
    copy("judgements", users(), place, [this](size_t k) { return users_.find(static_cast<int32_t>(k)); },
         &User::judgements);
    copy("judges", items(), place, [this](size_t k) { return items_.find(static_cast<int32_t>(k)); }, &Item::judges);
    copy("cell.", kCellFields, cells_.size(), place, [this](size_t k) { return &cells_[k]; });
    copy("value.", kValueFields, values_.size(), place, [this](size_t k) { return &values_[k]; });
    std::memcpy(place({"lately", 'f', 1, 1}), &lately_, sizeof lately_);
    std::memcpy(place({"learned", 'q', 1, 1}), &learned_, sizeof learned_);
  }

 private:
  // With what is known of one without events, where there are none.
  NEGFAST_INLINE const User& known_user(int32_t number) {
    if (const User* known = users_.find(number)) return *known;
    unknown_user_.factors = first_factors(seed(user_key_[number], true));
    return unknown_user_;
  }

  NEGFAST_INLINE const Item& known_item(int32_t number) {
    if (const Item* known = items_.find(number)) return *known;
    unknown_item_.factors = first_factors(seed(item_key_[number], false));
    return unknown_item_;
  }

  template <size_t n, class Row>
  static void copy(const std::string& prefix, const Field (&fields)[n], size_t rows,
                   const std::function<void*(const FeatureTable&)>& place, const Row& row) {
    for (const Field& field : fields) {
      auto* out = static_cast<std::byte*>(place({prefix + field.name, field.type, rows, field.width}));
      for (size_t k = 0; k < rows; ++k, out += field.bytes)
        std::memcpy(out, reinterpret_cast<const std::byte*>(row(k)) + field.offset, field.bytes);
    }
  }

  // Those of a row are between its start and the next one's, the oldest first.
  template <class Row, class Find, size_t most>
  static void copy(const std::string& name, size_t rows, const std::function<void*(const FeatureTable&)>& place,
                   const Find& find, Last<Judgement, most> Row::*judgements) {
    auto* start = static_cast<int64_t*>(place({name + ".start", 'q', rows + 1, 1}));
    for (size_t k = start[0] = 0; k < rows; ++k) {
      const Row* row = find(k);
      start[k + 1] = start[k] + (row == nullptr ? 0 : static_cast<int64_t>((row->*judgements).size()));
    }
    const auto total = static_cast<size_t>(start[rows]);
    auto* other = static_cast<int32_t*>(place({name + ".other", 'i', total, 1}));
    auto* residual = static_cast<float*>(place({name + ".residual", 'f', total, 1}));
    for (size_t k = 0; k < rows; ++k) {
      const Row* row = find(k);
      for (size_t n = 0; row != nullptr && n < (row->*judgements).size(); ++n) {
        *other++ = (row->*judgements)[n].other;
        *residual++ = (row->*judgements)[n].residual;
      }
    }
  }

  // The item of a user's judgement.
  NEGFAST_INLINE static int32_t number(const Judgement& judgement) {
    return judgement.other < 0 ? ~judgement.other : judgement.other;
  }

  // How alike each other user judged what this one judged.
  NEGFAST_INLINE void compare(const User& user) {
    if (++question_ == 0) {  // all numbers of questions are used up
      for (Alike& alike : alike_) alike.question = 0;
      question_ = 1;
    }
    for (size_t n = 0; n < user.judgements.size(); ++n) {
      const float residual = user.judgements[n].residual;
      const auto& judges = items_.find(number(user.judgements[n]))->judges;
      for (size_t k = 0; k < judges.size(); ++k) {
        Alike& alike = alike_[judges[k].other];
        alike.product = residual * judges[k].residual + (alike.question == question_ ? alike.product : 0);
        alike.question = question_;
      }
    }
  }

  // The first numbers of a text vector, twice.
  NEGFAST_INLINE static Lanes twice(const Text& text) {
    const auto half = std::bit_cast<std::array<Half, 2>>(text.part[0]);
    return std::bit_cast<Lanes>(std::array<Half, 2>{half[0], half[0]});
  }

  NEGFAST_INLINE Side side(const Sums& sums, int64_t moment) const {
    const float kept = sums.at == kNever ? 0 : left(moment - sums.at, kHalfLife);
    return {logit(mean(sums.dislikes, sums.count, settings_.prior_rate, kPseudoEvents)),
            static_cast<float>(logarithm(1 + sums.count)),
            static_cast<float>(mean(sums.value, sums.value_count, settings_.prior_value, kPseudoEvents)),
            spread(sums),
            {static_cast<float>(sums.dislike.excess / (sums.count + kPseudoEvents)),
             static_cast<float>(sums.of_value.excess / (sums.value_count + kPseudoEvents))},
            {recent(sums.dislike, kept), recent(sums.of_value, kept)}};
  }

  // Withdrawals of older events make a recent count negative.
  NEGFAST_INLINE static float recent(const Deviation& deviation, float kept) {
    const float count = std::max(deviation.recent_count * kept, 0.0f);
    return deviation.recent_excess * kept / (count + static_cast<float>(kRecentPseudoEvents));
  }

  NEGFAST_INLINE float* of_attributes(int32_t user, int32_t item, float* out) const {
    const size_t attributes = settings_.attributes.size();
    for (size_t a = 0; a < attributes; ++a) {
      const auto& attribute = settings_.attributes[a];
      const int64_t first = value_start_[item * attributes + a], end = value_start_[item * attributes + a + 1];
      std::fill(out + 2, out + 2 + attribute.columns, attribute.missing);
      double by_user = 0, by_all = 0;
      for (int64_t k = first; k < end; ++k) {
        const Value& value = values_[value_[k]];
        const size_t at = by_user_value_.place(by_user_value_.key(user, value_[k]));
        const Counts mine = by_user_value_.is_empty(at) ? Counts{} : by_user_value_.rows[at];
        by_user += mean(mine.dislikes, mine.count, settings_.prior_rate, kPseudoEvents);
        by_all += mean(value.dislikes, value.count, settings_.prior_rate, kPseudoEvents);
        if (value.column >= 0) out[2 + value.column] = value.content;
      }
      const auto count = static_cast<double>(end - first);
      out[0] = first == end ? kUnknown : static_cast<float>(by_user / count);
      out[1] = first == end ? kUnknown : static_cast<float>(by_all / count);
      out += 2 + attribute.columns;
    }
    return out;
  }

  NEGFAST_INLINE void learn_pending() {
    const int64_t now = moment(pending_[0].time);
    std::stable_sort(pending_.begin(), pending_.end(), [this](const Event& a, const Event& b) {
      const uint64_t x = user_key_[a.user], y = user_key_[b.user];
      return x != y ? x < y : a.time < b.time;
    });
    changes_.clear();
    for (const Event& event : pending_) changes_.push_back(change(event));
    for (size_t k = 0; k < pending_.size(); ++k) {
      if (k + kAhead < pending_.size()) fetch_early(pending_[k + kAhead].user, pending_[k + kAhead].item);
      learn(pending_[k], changes_[k], now);
    }
    pending_.clear();
    learned_ = now;
  }

  // Takes note of what the pair says now; what is expected comes from the moments before.
  NEGFAST_INLINE Change change(const Event& event) {
    const size_t at = said_.make(said_.key(event.user, event.item));
    const uint64_t before = said_.keys[at] >> 62;  // 0: nothing
    said_.keys[at] = (said_.keys[at] & said_.kKey) | static_cast<uint64_t>(event.feedback) << 62;
    const bool judged = event.feedback != kWithdrawn, judged_before = before != 0 && before != kWithdrawn;
    Change out{};
    out.judged = judged - judged_before;
    out.dislikes = (event.feedback == kDislike) - (before == kDislike);
    out.is_first = before == 0 && judged;
    if (settings_.has_values) {
      const float value = judged ? event.value : kUnknown, old = before == 0 ? kUnknown : said_.rows[at];
      said_.rows[at] = value;
      if (std::isfinite(value)) {
        out.value_count += 1;
        out.value += value;
        out.value_square += static_cast<double>(value) * value;
      }
      if (std::isfinite(old)) {
        out.value_count -= 1;
        out.value -= old;
        out.value_square -= static_cast<double>(old) * old;
      }
    }
    const User* known_user = users_.find(event.user);
    const Item* known_item = items_.find(event.item);
    const Sums& user = known_user == nullptr ? unknown_user_.sums : known_user->sums;
    const Sums& item = known_item == nullptr ? unknown_item_.sums : known_item->sums;
    out.item_mean = mean(item.dislikes, item.count, settings_.prior_rate, kPseudoEvents);
    out.user_mean = settings_.prior_rate + user.dislike.excess / (user.count + kPseudoEvents);
    out.item_value = mean(item.value, item.value_count, settings_.prior_value, kPseudoEvents);
    out.user_value = settings_.prior_value + user.of_value.excess / (user.value_count + kPseudoEvents);
    // The probability of a dislike by both rates: their odds multiplied, over the prior's.
    const double against = (user.dislikes + kPseudoEvents * prior_) * (item.dislikes + kPseudoEvents * prior_) *
                           (1 - prior_);
    const double in_favour = (user.count - user.dislikes + kPseudoEvents * (1 - prior_)) *
                             (item.count - item.dislikes + kPseudoEvents * (1 - prior_)) * prior_;
    const double expected = against / (against + in_favour);
    out.residual = static_cast<float>(out.dislikes - expected * out.judged);
    return out;
  }

  NEGFAST_INLINE static void deviate(Deviation& to, double total, double count, double expected) {
    const double excess = total - count * expected;
    to.excess += excess;
    to.absolute += count * std::abs(excess);
    to.recent_count += static_cast<float>(count);
    to.recent_excess += static_cast<float>(excess);
  }

  NEGFAST_INLINE static void count(Sums& sums, const Change& change, int64_t now) {
    if (sums.at != now && sums.at != kNever) {
      const float kept = left(now - sums.at, kHalfLife);
      for (Deviation* of : {&sums.dislike, &sums.of_value}) {
        of->recent_count *= kept;
        of->recent_excess *= kept;
      }
      sums.recent_events *= left(now - sums.at, kCountHalfLife);
    }
    sums.at = now;
    sums.recent_events += static_cast<float>(change.judged);
    sums.count += change.judged;
    sums.dislikes += change.dislikes;
    sums.value_count += change.value_count;
    sums.value += change.value;
    sums.value_square += change.value_square;
  }

  NEGFAST_INLINE void learn(const Event& event, const Change& change, int64_t now) {
    User* known_user = users_.find(event.user);
    if (known_user == nullptr) {
      known_user = &users_.make(event.user, unknown_user_);
      known_user->factors = first_factors(seed(user_key_[event.user], true));
    }
    Item* known_item = items_.find(event.item);
    if (known_item == nullptr) {
      known_item = &items_.make(event.item, unknown_item_);
      known_item->factors = first_factors(seed(item_key_[event.item], false));
    }
    User& user = *known_user;
    Item& item = *known_item;
    const float r = change.residual;
    user.judgements.add({change.is_first ? event.item : ~event.item, r});
    user.square += r * r;
    alike_[event.user].length = std::sqrt(user.square);
    item.judges.add({event.user, r});
    if (change.is_first) factorise(user.factors, item.factors, r);
    count(user.sums, change, now);
    count(item.sums, change, now);
    deviate(user.sums.dislike, change.dislikes, change.judged, change.item_mean);
    deviate(item.sums.dislike, change.dislikes, change.judged, change.user_mean);
    if (settings_.has_values) {
      deviate(user.sums.of_value, change.value, change.value_count, change.item_value);
      deviate(item.sums.of_value, change.value, change.value_count, change.user_value);
    }
    for (const int32_t number : cell_[event.item]) {
      Cell& cell = cells_[number];
      cell.count += change.judged;
      cell.excess += change.dislikes - prior_ * change.judged;
    }
    const size_t attributes = settings_.attributes.size();
    for (int64_t k = value_start_[event.item * attributes]; k < value_start_[(event.item + 1) * attributes]; ++k) {
      Counts& mine = by_user_value_.rows[by_user_value_.make(by_user_value_.key(event.user, value_[k]))];
      Value& all = values_[value_[k]];
      mine.count += change.judged;
      mine.dislikes += change.dislikes;
      all.count += change.judged;
      all.dislikes += change.dislikes;
    }
    if (event.feedback == kWithdrawn) return;
    const auto label = static_cast<float>(event.feedback == kDislike);
    user.sums.lately += kLately * (label - user.sums.lately);
    item.sums.lately += kLately * (label - item.sums.lately);
    lately_ += kLatelyAll * (label - lately_);
    user.last = now;
    if (event.feedback == kDislike) user.last_dislike = now;
    if (item.first == kNever) item.first = now;
  }

  // The weights twice of the ridge regression of the user's residuals, each pair's first, on text: by Cholesky's method.
  NEGFAST_INLINE Lanes ridge(const User& user) const {
    Lanes gram[kRidge / 2] = {}, total = {};
    for (size_t k = 0; k < user.judgements.size(); ++k) {
      const Judgement& judgement = user.judgements[k];
      if (judgement.other < 0) continue;
      const Lanes x = twice(text_[judgement.other]);
      for (size_t p = 0; p < kRidge / 2; ++p) gram[p] += rows(x, p) * x;
      total += judgement.residual * x;
    }
    float lower[kRidge][kRidge], weight[kRidge];
    for (size_t row = 0; row < kRidge; ++row) {
      for (size_t column = 0; column <= row; ++column) {
        float rest = gram[row / 2][row % 2 * kRidge + column];
        for (size_t k = 0; k < column; ++k) rest -= lower[row][k] * lower[column][k];
        lower[row][column] = column < row ? rest / lower[column][column] : std::sqrt(rest + kPenalty);
      }
      float rest = total[row];
      for (size_t k = 0; k < row; ++k) rest -= lower[row][k] * weight[k];
      weight[row] = rest / lower[row][row];
    }
    for (size_t row = kRidge; row-- > 0;) {
      for (size_t k = row + 1; k < kRidge; ++k) weight[row] -= lower[k][row] * weight[k];
      weight[row] /= lower[row][row];
    }
    Lanes out;
    for (size_t l = 0; l < kLanes; ++l) out[l] = weight[l % kRidge];
    return out;
  }

  // Number 2p of `x` eight times, then number 2p + 1.
  NEGFAST_INLINE static Lanes rows(const Lanes& x, size_t p) {
    return std::bit_cast<Lanes>(std::array<Half, 2>{Half{} + x[2 * p], Half{} + x[2 * p + 1]});
  }

  // One implicit gradient step, which cannot overshoot (Kulis and Bartlett 2010).
  NEGFAST_INLINE static void factorise(Lanes& p, Lanes& q, float residual) {
    const float error = residual - sum(p * q), curvature = sum(p * p) + sum(q * q);
    const float step = kStep * error / (1 + kStep * curvature);
    const Lanes before = p;
    p += step * q - kStep * kShrink * p;
    q += step * before - kStep * kShrink * q;
  }

  const FeatureSettings settings_;
  const double prior_;  // the rate, where its odds are needed
  size_t width_;
  std::vector<uint64_t> user_key_, item_key_;
  States<User> users_;
  States<Item> items_;
  User unknown_user_;  // what is known of those without events; factors are those of the last one asked
  Item unknown_item_;
  std::vector<Text> text_;
  std::vector<std::array<int32_t, 2>> cell_;  // of every item
  std::vector<Cell> cells_;
  std::vector<int64_t> value_start_{0};
  std::vector<int32_t> value_;
  std::vector<Value> values_;
  Table<float> said_;             // of every (user, item): in the key the last feedback, its value
  Table<Counts> by_user_value_;   // of every (user, attribute value)
  std::vector<Alike> alike_;      // every user
  uint32_t question_ = 0;         // number of the present one
  float lately_;                  // running mean of all
  std::vector<Event> pending_;    // of one moment, not yet learned
  std::vector<Change> changes_;   // of these
  int64_t learned_ = kNever;      // the last moment learned

 public:
  Asked asked_;
};

namespace {

NEGFAST_CLONES void replay_events(FeatureState& state, const FeatureEvents& events, const FeatureQuestions& questions,
                                  float* out) {
  const size_t n = events.user.size(), asked = questions.user.size();
  auto& user = state.asked_;
  size_t next = 0;
  const auto answer_until = [&](int64_t moment, bool all) __attribute__((always_inline)) {
    for (bool same = false; next < asked && (all || questions.moment[next] <= moment); ++next) {
      if (!same || user.number != questions.user[next] || user.moment != questions.moment[next]) {
        state.learn_before(questions.moment[next]);
        state.ask(user, questions.user[next], questions.moment[next]);
        same = true;
      }
      if (next + kAhead < asked) state.fetch_early(questions.user[next + kAhead], questions.item[next + kAhead]);
      state.answer(user, questions.item[next], out + next * state.width());
    }
  };
  for (size_t k = 0; k < n; ++k) {
    if (next < asked) answer_until(state.moment(events.time[k]), false);
    if (state.waiting() < kAhead && k + kAhead < n) state.fetch_early(events.user[k + kAhead], events.item[k + kAhead]);
    state.push({events.user[k], events.item[k], events.time[k], events.value.empty() ? kUnknown : events.value[k],
                events.feedback[k]});
  }
  answer_until(0, true);
}

NEGFAST_CLONES void add_event(FeatureState& state, const Event& event) {
  state.push(event);
}

NEGFAST_CLONES void answer_user(FeatureState& state, int32_t number, std::span<const int32_t> items, int64_t moment,
                                float* out) {
  state.learn_before(moment);
  state.ask(state.asked_, number, moment);
  for (size_t k = 0; k < items.size(); ++k) {
    if (k + kAhead < items.size()) state.fetch_early(number, items[k + kAhead]);
    state.answer(state.asked_, items[k], out + k * state.width());
  }
}

}  // namespace

std::vector<std::pair<std::string, double>> feature_constants() {
  return {{"pseudo_events", kPseudoEvents},
          {"recent_pseudo_events", kRecentPseudoEvents},
          {"cell_pseudo_events", kCellPseudoEvents},
          {"half_life", kHalfLife},
          {"count_half_life", kCountHalfLife},
          {"judgements", kJudgements},
          {"judges", kJudges},
          {"recent", kRecent},
          {"ridge", kRidge},
          {"alike_weight", kAlikeWeight},
          {"alike_length", kAlikeLength},
          {"text_weight", kTextWeight},
          {"penalty", kPenalty},
          {"step", kStep},
          {"shrink", kShrink},
          {"start", kStart},
          {"lately", kLately},
          {"lately_all", kLatelyAll}};
}

Features::Features(const FeatureSettings& settings) : state_(std::make_unique<FeatureState>(settings)) {}
Features::~Features() = default;

size_t Features::width() const { return state_->width(); }
size_t Features::attributes() const { return state_->settings().attributes.size(); }
bool Features::has_values() const { return state_->settings().has_values; }
size_t Features::users() const { return state_->users(); }
size_t Features::items() const { return state_->items(); }
size_t Features::bytes() const { return state_->bytes(); }
void Features::tables(const std::function<void*(const FeatureTable&)>& place) { state_->tables(place); }

void Features::add_users(std::span<const uint64_t> keys) { state_->add_users(keys); }
void Features::add_values(std::span<const int32_t> column, std::span<const float> content) {
  state_->add_values(column, content);
}
void Features::add_items(const FeatureItems& items) { state_->add_items(items); }

void Features::replay(const FeatureEvents& events, const FeatureQuestions& questions, float* out) {
  const size_t n = events.user.size(), asked = questions.user.size();
  for (size_t k = 0; k < n; ++k) {
    if (k == 0) state_->check_event(events.user[k], events.item[k], events.time[k], events.feedback[k]);
    state_->check(events.user[k], events.item[k]);
    if (events.feedback[k] > kWithdrawn) refuse("feedback " + std::to_string(events.feedback[k]) + ": expected 0 to 3");
    if (k > 0 && state_->moment(events.time[k]) < state_->moment(events.time[k - 1]))
      refuse("events: expected in order of moment");
  }
  for (size_t k = 0; k < asked; ++k) {
    state_->check(questions.user[k], questions.item[k]);
    if (k == 0) state_->check_moment(questions.moment[k]);
    if (k > 0 && questions.moment[k] < questions.moment[k - 1]) refuse("questions: expected in order of moment");
  }
  replay_events(*state_, events, questions, out);
}

void Features::add(int32_t user, int32_t item, int64_t time, uint8_t feedback, float value) {
  state_->check_event(user, item, time, feedback);
  add_event(*state_, {user, item, time, value, feedback});
}

void Features::answer(int32_t user, std::span<const int32_t> items, int64_t moment, float* out) {
  for (const int32_t item : items) state_->check(user, item);
  state_->check_moment(moment);
  if (!items.empty()) answer_user(*state_, user, items, moment, out);
}

}  // namespace negfast
