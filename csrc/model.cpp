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
  std::vector<uint32_t> of_item;  // item * 3 + feedback
  NumberCounts delta, run_delta, run_length;
  int64_t last = INT64_MIN;  // units
};

void count_stripe(const Histories& h, uint64_t first_row, uint64_t items, uint32_t unit, int64_t base, Counts& c) {
  auto bad = [&](uint64_t row, const std::string& what) {
    throw ShardError("user " + std::to_string(first_row + row) + ": " + what);
  };
  // Locals, since every count stored might alias what is behind the references.
  const int32_t* item = h.item;
  const uint8_t* feedback = h.feedback;
  const int64_t* time = h.time;
  uint32_t* of_item = c.of_item.data();
  uint64_t *of_delta = c.delta.of_symbol.data(), *of_run_delta = c.run_delta.of_symbol.data();
  auto symbol = [](uint64_t value) { return to_symbol(value, kFinestHeadBits).index; };
  int64_t last = c.last;
  for (uint64_t r = 0; r < h.rows(); ++r) {
    const int64_t begin = h.offsets[r], end = h.offsets[r + 1];
    int64_t previous = base, run_start = begin;
    for (int64_t i = begin; i < end; ++i) {
      if (static_cast<uint64_t>(static_cast<uint32_t>(item[i])) >= items)
        bad(r, "found item " + std::to_string(item[i]) + ", expected 0 to " + std::to_string(items - 1));
      if (feedback[i] >= kFeedbacks) bad(r, "found feedback " + std::to_string(feedback[i]) + ", expected 0, 1 or 2");
      if (time[i] < -kFarthest || time[i] > kFarthest)
        bad(r, "found time " + std::to_string(time[i]) + ", expected at most 2^53 seconds from 1970");
      const int64_t now = to_units(time[i], unit);
      const auto delta = static_cast<uint64_t>(now) - static_cast<uint64_t>(previous);
      if (now < previous || (i > begin && time[i] < time[i - 1]))
        bad(r, "found time " + std::to_string(time[i]) + " after a later one, expected events in order of time");
      if (delta >> kTimeBits) bad(r, "found times 2^32 units apart, expected less");
      ++of_item[static_cast<size_t>(item[i]) * kFeedbacks + feedback[i]];
      const uint32_t delta_symbol = symbol(delta);
      ++of_delta[delta_symbol];
      if (delta > 0 || i == begin) {
        ++of_run_delta[delta_symbol];
        if (i > begin) c.run_length.add(static_cast<uint64_t>(i - run_start - 1));
        run_start = i;
      }
      previous = now;
    }
    if (begin < end) {
      c.run_length.add(static_cast<uint64_t>(end - run_start - 1));
      last = std::max(last, previous);
    }
  }
  c.last = last;
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
    counts[0].delta.add(counts[worker].delta);
    counts[0].run_delta.add(counts[worker].run_delta);
    counts[0].run_length.add(counts[worker].run_length);
    counts[0].last = std::max(counts[0].last, counts[worker].last);
  }
  model.time_last = model.events > 0 ? counts[0].last : model.time_base;

  const auto& of_item = counts[0].of_item;
  auto popularity = [&](uint32_t item) { return of_item[item * 3] + of_item[item * 3 + 1] + of_item[item * 3 + 2]; };
  for (uint32_t item = 0; item < items; ++item)
    if (popularity(item) > 0) model.item_of_rank.push_back(item);
  std::stable_sort(model.item_of_rank.begin(), model.item_of_rank.end(),
                   [&](uint32_t a, uint32_t b) { return popularity(a) > popularity(b); });
  model.rank_of_item.resize(items);
  for (uint32_t rank = 0; rank < model.item_of_rank.size(); ++rank) model.rank_of_item[model.item_of_rank[rank]] = rank;

  model.item = cheapest_code(bits_for(model.item_of_rank.size()), kFeedbacks, [&](auto&& add) {
    for (uint32_t rank = 0; rank < model.item_of_rank.size(); ++rank)
      for (unsigned feedback = 0; feedback < kFeedbacks; ++feedback) {
        const uint32_t n = of_item[size_t{model.item_of_rank[rank]} * kFeedbacks + feedback];
        if (n > 0) add(rank, feedback, n);
      }
  });
  NumberCode plain = cheapest_code(counts[0].delta), of_run = cheapest_code(counts[0].run_delta);
  NumberCode length = cheapest_code(counts[0].run_length);
  model.time_runs = of_run.bits + length.bits < plain.bits;
  model.delta = model.time_runs ? std::move(of_run) : std::move(plain);
  if (model.time_runs) model.run = std::move(length);
  return model;
}

}  // namespace negfast
