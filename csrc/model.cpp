#include "model.hpp"

#include <algorithm>
#include <numeric>
#include <string>

#include "format.hpp"
#include "parallel.hpp"

namespace negfast {
namespace {

constexpr unsigned kFinestHeadBits = 6;

// Counts of numbers by their finest symbol; coarser ones are sums of these.
struct NumberCounts {
  std::vector<uint64_t> of_symbol = std::vector<uint64_t>(symbol_count(kTimeBits, kFinestHeadBits), 0);
  void add(uint64_t value) { ++of_symbol[to_symbol(value, kFinestHeadBits).index]; }
  void add(const NumberCounts& other) {
    for (size_t s = 0; s < of_symbol.size(); ++s) of_symbol[s] += other.of_symbol[s];
  }
};

struct Counts {
  std::vector<uint32_t> of_item;  // feedback * items + item: mostly one feedback, whose counts stay in the cache
  NumberCounts run_delta;         // from run to run of equal times
  NumberCounts longer_run;        // lengths - 1 of the runs that have more than one event
  uint64_t zeros = 0;             // deltas within runs
  int64_t last = INT64_MIN;       // units

  NumberCounts delta() const {
    NumberCounts counts = run_delta;
    counts.of_symbol[0] += zeros;
    return counts;
  }
  NumberCounts run_length() const {
    auto total = [](const NumberCounts& c) {
      return std::accumulate(c.of_symbol.begin(), c.of_symbol.end(), uint64_t{0});
    };
    NumberCounts counts = longer_run;
    counts.of_symbol[0] += total(run_delta) - total(longer_run);
    return counts;
  }
};

// Wraps instead of overflowing: what it is given may be nonsense.
inline uint64_t unsigned_difference(int64_t a, int64_t b) {
  return static_cast<uint64_t>(a) - static_cast<uint64_t>(b);
}

// Throws for the first event of the row that cannot be stored.
void check_row(const Histories& h, uint64_t r, uint64_t user, uint64_t items, uint32_t unit, int64_t base) {
  auto bad = [&](const std::string& what) { throw ShardError("user " + std::to_string(user) + ": " + what); };
  int64_t previous = base;
  for (int64_t i = h.offsets[r]; i < h.offsets[r + 1]; ++i) {
    const int64_t time = h.time[i];
    if (static_cast<uint64_t>(static_cast<uint32_t>(h.item[i])) >= items)
      bad("found item " + std::to_string(h.item[i]) + ", expected 0 to " + std::to_string(items - 1));
    if (h.feedback[i] >= kFeedbacks)
      bad("found feedback " + std::to_string(h.feedback[i]) + ", expected 0 to 3");
    if (time < -kFarthest || time > kFarthest)
      bad("found time " + std::to_string(time) + ", expected at most 2^53 seconds from 1970");
    const int64_t now = to_units(time, unit);
    if (now < previous || (i > h.offsets[r] && time < h.time[i - 1]))
      bad("found time " + std::to_string(time) + " after a later one, expected events in order of time");
    if (unsigned_difference(now, previous) >> kTimeBits) bad("found times 2^32 units apart, expected less");
    previous = now;
  }
}

// A row's items and feedbacks; false, with nothing counted, where one is out of range.
bool count_items(const int32_t* item, const uint8_t* feedback, int64_t n, uint64_t items, uint32_t* of_item) {
  uint32_t highest = 0;
  uint8_t highest_feedback = 0;
  for (int64_t i = 0; i < n; ++i) {
    highest = std::max(highest, static_cast<uint32_t>(item[i]));
    highest_feedback = std::max(highest_feedback, feedback[i]);
  }
  if (n > 0 && (highest >= items || highest_feedback >= kFeedbacks)) return false;
  for (int64_t i = 0; i < n; ++i) ++of_item[feedback[i] * items + static_cast<uint32_t>(item[i])];
  return true;
}

// A row's deltas and runs; false where its times are out of order or range.
bool count_times(const int64_t* time, int64_t n, uint32_t unit, int64_t base, Counts& c) {
  if (n == 0) return true;
  if (time[0] < -kFarthest || time[n - 1] > kFarthest) return false;
  // A local pointer, since every count stored might alias what is behind the reference.
  uint64_t* of_delta = c.run_delta.of_symbol.data();
  uint64_t wrong = 0, zeros = 0, run = 0;  // run: events of the one at hand after its first
  int64_t previous = base, before = time[0];
  for (int64_t i = 0; i < n; ++i) {
    // A division costs more than all else that is done with an event, and most share their unit with the last one.
    const auto within = static_cast<uint64_t>(time[i]) - static_cast<uint64_t>(previous) * unit;
    const int64_t now = unit == 1 ? time[i] : within < unit ? previous : to_units(time[i], unit);
    const uint64_t delta = unsigned_difference(now, previous);
    wrong |= delta | (unsigned_difference(time[i], before) & uint64_t{1} << 63);  // a negative one has this bit
    before = time[i];
    previous = now;
    if (delta == 0 && i > 0) {
      ++run;
      continue;
    }
    ++of_delta[to_symbol(static_cast<uint32_t>(delta), kFinestHeadBits).index];
    if (run > 0) c.longer_run.add(run);
    zeros += run;
    run = 0;
  }
  if (run > 0) c.longer_run.add(run);
  c.zeros += zeros + run;
  c.last = std::max(c.last, previous);
  return wrong >> kTimeBits == 0;
}

void count_stripe(const Histories& h, uint64_t first_row, uint64_t items, uint32_t unit, int64_t base, Counts& c) {
  for (uint64_t r = 0; r < h.rows(); ++r) {
    const int64_t begin = h.offsets[r], n = h.offsets[r + 1] - begin;
    if (!count_items(h.item + begin, h.feedback + begin, n, items, c.of_item.data()) ||
        !count_times(h.time + begin, n, unit, base, c))
      check_row(h, r, first_row + r, items, unit, base);
  }
}

// The cheapest head_bits for these counts, each a (value range, tag, count).
template <class ForEach>
NumberCode cheapest_code(int value_bits, unsigned tags, ForEach&& for_each) {
  NumberCode best;
  for (unsigned head_bits = 1; head_bits <= kFinestHeadBits; ++head_bits) {
    NumberCode code{head_bits, tags, {}, {}, 0};
    std::vector<uint64_t> counts(size_t{symbol_count(value_bits, head_bits)} * tags, 0);
    for_each([&](uint64_t value, unsigned tag, uint64_t count) {
      const Symbol symbol = to_symbol(value, head_bits);
      counts[symbol.index * tags + tag] += count;
      code.bits += count * symbol.extra_bits;
    });
    if (std::count_if(counts.begin(), counts.end(), [](uint64_t n) { return n > 0; }) > (1 << kMaxCodeBits)) break;
    code.lengths = code_lengths(counts);
    code.bits += coded_bits(counts, code.lengths);
    if (best.lengths.empty() || code.bits < best.bits) best = std::move(code);
  }
  best.codes = canonical_codes(best.lengths);
  return best;
}

NumberCode cheapest_code(const NumberCounts& counts) {
  return cheapest_code(kTimeBits, 1, [&](auto&& add) {
    for (uint32_t s = 0; s < counts.of_symbol.size(); ++s)
      if (counts.of_symbol[s] > 0) add(symbol_range(s, kFinestHeadBits).first, 0, counts.of_symbol[s]);
  });
}

}  // namespace

ShardModel build_model(const EventSource& source, uint64_t items, uint32_t time_unit, unsigned threads) {
  if (items >= kMaxItems) throw ShardError("found " + std::to_string(items) + " items, expected fewer than 2^30");
  if (time_unit == 0) throw ShardError("found a time unit of 0 seconds, expected at least 1");
  ShardModel model;
  model.time_unit = time_unit;
  model.time_base = to_units(source.earliest(), time_unit);

  // Every worker counts for itself; more workers than 256 MiB of counters allow would not be worth their memory.
  const uint64_t counter_bytes = std::max<uint64_t>(1, items * kFeedbacks * sizeof(uint32_t));
  threads = static_cast<unsigned>(std::clamp<uint64_t>((256u << 20) / counter_bytes, 1, std::max(1u, threads)));
  const uint64_t stripes = (source.rows() + kStripeUsers - 1) / kStripeUsers;
  model.stripe_events.resize(stripes);
  std::vector<Counts> counts(threads);
  for (Counts& c : counts) c.of_item.resize(items * kFeedbacks);
  std::vector<SourceBuffer> buffers(threads);
  parallel_for(stripes, threads, [&](size_t stripe, unsigned worker) {
    const uint64_t first = stripe * kStripeUsers;
    const uint64_t rows = std::min<uint64_t>(kStripeUsers, source.rows() - first);
    const Histories h = source.read(first, rows, buffers[worker]);
    count_stripe(h, first, items, time_unit, model.time_base, counts[worker]);
    model.stripe_events[stripe] = static_cast<uint64_t>(h.offsets.back() - h.offsets.front());
  });
  for (uint64_t n : model.stripe_events) model.events += n;
  if (model.events >> 32)
    throw ShardError("found " + std::to_string(model.events) + " events, expected fewer than 2^32 a shard");
  for (unsigned worker = 1; worker < threads; ++worker) {
    for (size_t i = 0; i < counts[0].of_item.size(); ++i) counts[0].of_item[i] += counts[worker].of_item[i];
    counts[0].run_delta.add(counts[worker].run_delta);
    counts[0].longer_run.add(counts[worker].longer_run);
    counts[0].zeros += counts[worker].zeros;
    counts[0].last = std::max(counts[0].last, counts[worker].last);
  }
  model.time_last = model.events > 0 ? counts[0].last : model.time_base;

  const auto& of_item = counts[0].of_item;
  auto popularity = [&](uint32_t item) {
    uint32_t n = 0;
    for (unsigned feedback = 0; feedback < kFeedbacks; ++feedback) n += of_item[feedback * items + item];
    return n;
  };
  for (uint32_t item = 0; item < items; ++item)
    if (popularity(item) > 0) model.item_of_rank.push_back(item);
  std::stable_sort(model.item_of_rank.begin(), model.item_of_rank.end(),
                   [&](uint32_t a, uint32_t b) { return popularity(a) > popularity(b); });
  const auto withdrawn = of_item.begin() + static_cast<ptrdiff_t>((kFeedbacks - 1) * items);
  model.withdrawals = std::any_of(withdrawn, of_item.end(), [](uint32_t n) { return n > 0; });
  const unsigned tags = feedbacks_of(model.withdrawals ? kWithdrawals : 0u);
  model.item = cheapest_code(bits_for(model.item_of_rank.size()), tags, [&](auto&& add) {
    for (uint32_t rank = 0; rank < model.item_of_rank.size(); ++rank)
      for (unsigned feedback = 0; feedback < tags; ++feedback) {
        const uint32_t n = of_item[feedback * items + model.item_of_rank[rank]];
        if (n > 0) add(rank, feedback, n);
      }
  });
  model.item_codes.resize(items * kFeedbacks);
  const Encoder encoder(model.item);
  for (uint32_t rank = 0; rank < model.item_of_rank.size(); ++rank)
    for (unsigned feedback = 0; feedback < tags; ++feedback)
      model.item_codes[feedback * items + model.item_of_rank[rank]] = encoder.encode(rank, feedback, tags);
  NumberCode plain = cheapest_code(counts[0].delta()), of_run = cheapest_code(counts[0].run_delta);
  NumberCode length = cheapest_code(counts[0].run_length());
  model.time_runs = of_run.bits + length.bits < plain.bits;
  model.delta = model.time_runs ? std::move(of_run) : std::move(plain);
  if (model.time_runs) model.run = std::move(length);
  return model;
}

}  // namespace negfast
