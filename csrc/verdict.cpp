#include "verdict.hpp"

#include <algorithm>
#include <cmath>

#include "parallel.hpp"

namespace negfast {
namespace {

constexpr size_t kUnits = kMembers * kWidth;
static_assert(kWidth % kLanes == 0);

struct Table {
  size_t features, bins, stride;
  const float *edges, *rows, *bias, *second, *second_bias, *last;
  float wide_bias;
};

// What a row is before the first layer's activation, and the wide part of its logit.
template <size_t parts>
NEGFAST_INLINE void look_up(const Table& table, const float* features, float* hidden) {
  Lanes total[parts];
#pragma GCC unroll 16
  for (size_t p = 0; p < parts; ++p) total[p] = load(table.bias + p * kLanes);
  for (size_t f = 0; f < table.features; ++f) {
    const float x = features[f];
    const float* edges = table.edges + f * (table.bins + 1);
    const float* at = table.rows + f * (table.bins + 2) * table.stride;
    if (std::isnan(x)) {
      at += (table.bins + 1) * table.stride;
#pragma GCC unroll 16
      for (size_t p = 0; p < parts; ++p) total[p] += load(at + p * kLanes);
      continue;
    }
    size_t bin = 0;
    for (size_t k = 1; k <= table.bins; ++k) bin += x >= edges[k];
    at += bin * table.stride;
    if (bin == table.bins) {
#pragma GCC unroll 16
      for (size_t p = 0; p < parts; ++p) total[p] += load(at + p * kLanes);
      continue;
    }
    const float share = std::max((x - edges[bin]) / (edges[bin + 1] - edges[bin]), 0.0f);
#pragma GCC unroll 16
    for (size_t p = 0; p < parts; ++p)
      total[p] += (1 - share) * load(at + p * kLanes) + share * load(at + table.stride + p * kLanes);
  }
#pragma GCC unroll 16
  for (size_t p = 0; p < parts; ++p) store(hidden + p * kLanes, total[p]);
}

NEGFAST_CLONES void answer_rows(const Table& table, size_t rows, const float* features, float* out) {
  alignas(64) float hidden[kUnits + kLanes];
  for (size_t r = 0; r < rows; ++r) {
    look_up<kUnits / kLanes + 1>(table, features + r * table.features, hidden);
    const Lanes none{};
    Lanes total{};
    for (size_t unit = 0; unit < kUnits; unit += kLanes) {  // of the second layer
      const size_t member = unit / kWidth, column = unit % kWidth;
      Lanes units = load(table.second_bias + unit);
      for (size_t k = member * kWidth; k < (member + 1) * kWidth; ++k)
        units += std::max(hidden[k], 0.0f) * load(table.second + k * kWidth + column);
      total += (units > none ? units : none) * load(table.last + unit);
    }
    out[r] = hidden[kUnits] + table.wide_bias + sum(total) / kMembers;
  }
}

}  // namespace

Verdict::Verdict(size_t features, size_t bins, const float* edges, const float* first, const float* first_bias,
                 const float* second, const float* second_bias, const float* last, const float* wide, float wide_bias)
    : features_(features),
      bins_(bins),
      stride_(kUnits + kLanes),
      edges_(edges, edges + features * (bins + 1)),
      bias_(stride_),
      second_(second, second + kUnits * kWidth),
      second_bias_(second_bias, second_bias + kUnits),
      last_(last, last + kUnits),
      table_(features * (bins + 2) * stride_),
      wide_bias_(wide_bias) {
  std::copy_n(first_bias, kUnits, bias_.begin());
  const size_t encoded = features * (bins + 1);
  for (size_t unit = 0; unit <= kUnits; ++unit) {  // the last is the wide part
    const float* weight = unit < kUnits ? first + unit * encoded : wide;
    for (size_t f = 0; f < features; ++f) {
      double total = 0;
      for (size_t k = 0; k < bins + 2; ++k) {  // every edge, then what is unknown
        const float* of_edges = edges + f * (bins + 1);
        if (k > 0 && k <= bins && of_edges[k] > of_edges[k - 1]) total += weight[f * (bins + 1) + k - 1];
        table_[(f * (bins + 2) + k) * stride_ + unit] =
            k <= bins ? static_cast<float>(total) : weight[f * (bins + 1) + bins];
      }
    }
  }
}

void Verdict::logits(size_t rows, const float* features, float* out, unsigned threads) const {
  const Table table{features_,     bins_,          stride_,             edges_.data(), table_.data(),
                    bias_.data(), second_.data(), second_bias_.data(), last_.data(),  wide_bias_};
  parallel_rows(rows, threads, [&](size_t start, size_t count) {
    answer_rows(table, count, features + start * features_, out + start);
  });
}

}  // namespace negfast
