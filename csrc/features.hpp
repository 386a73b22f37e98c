// What the past says of a user, an item and their pair, kept up to date event by event: the inputs of the verdict
// and of the baselines. negfast/data/features.py names the columns.
//
// Events are learned moment by moment: those of one moment see nothing of each other, and the newest moment's wait until
// a later one is added or asked about. So events that arrive one by one leave the same state as a log read at once.
// Memory is linear in users, items, judged pairs and (user, attribute value) pairs: of a user's and an item's judgements
// the last ones are kept. Nobody without a like, dislike or withdrawal has a state.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace negfast {

constexpr size_t kText = 32;         // numbers of an item's text vector
constexpr int kPseudoEvents = 5;     // as expected, mixed into every rate and mean

struct FeatureSettings {
  int64_t unit;        // seconds: a moment is a time rounded down to a multiple
  double prior_rate;   // dislike rate of all, in (0, 1)
  double prior_value;  // mean value of all
  bool has_values;
  struct Attribute {
    size_t columns;  // that show an item's values
    float missing;   // what a column holds where no value of the item sets it
  };
  std::vector<Attribute> attributes;
};

struct FeatureItems {
  std::span<const uint64_t> key;         // [items]
  const float* text;                     // [items, kText], unit vectors or zeros
  const int32_t* cell;                   // [items, 2], a coarse and a fine group of items of like text, not negative
  std::span<const int64_t> value_start;  // [items * attributes + 1]: where an item's values of an attribute begin
  std::span<const int32_t> value;        // numbers of values, see add_values
};

// Likes, dislikes, withdrawals and exposures; exposures count nothing. In order of moment; of one user also of time.
struct FeatureEvents {
  std::span<const int32_t> user, item;
  std::span<const int64_t> time;  // seconds
  std::span<const uint8_t> feedback;
  std::span<const float> value;  // NaN: none; empty in a log without values
};

// In order of moment.
struct FeatureQuestions {
  std::span<const int32_t> user, item;
  std::span<const int64_t> moment;  // seconds
};

// A part of the state: `width` numbers of every user, item, cell or attribute value, such as "user.factors", or of every
// judgement that is kept, such as "judges.residual", between "judges.start" of an item and of the next.
struct FeatureTable {
  std::string name;
  char type;  // as numpy names it: f float, d double, i int32_t, q int64_t
  size_t rows, width;
};

// What formulas need beside the state, by name; times in seconds.
std::vector<std::pair<std::string, double>> feature_constants();

class FeatureState;

// Wrong arguments raise std::invalid_argument and change nothing.
class Features {
 public:
  explicit Features(const FeatureSettings& settings);
  ~Features();

  size_t width() const;
  size_t attributes() const;
  bool has_values() const;
  size_t users() const;
  size_t items() const;

  // Users and items are numbered in the order in which they are added. First factors, and the order within a moment,
  // follow their keys: numbers change nothing, nor does who else is there.
  void add_users(std::span<const uint64_t> keys);
  // Attribute values, numbered across attributes: `column` of its attribute that an item with the value sets to
  // `content`, -1 for none.
  void add_values(std::span<const int32_t> column, std::span<const float> content);
  void add_items(const FeatureItems& items);

  // Answers float [questions, width], each from the events before its moment. The events go on from those learned.
  void replay(const FeatureEvents& events, const FeatureQuestions& questions, float* out);
  void add(int32_t user, int32_t item, int64_t time, uint8_t feedback, float value);
  // The same for one user's candidates, float [items, width].
  void answer(int32_t user, std::span<const int32_t> items, int64_t moment, float* out);

  size_t bytes() const;  // of the state

  // Learns what waits, and copies every table of the state to where `place` wants it.
  void tables(const std::function<void*(const FeatureTable&)>& place);

 private:
  std::unique_ptr<FeatureState> state_;
};

}  // namespace negfast
