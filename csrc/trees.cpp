#include "trees.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "parallel.hpp"

namespace negfast {
namespace {

using Limits = std::numeric_limits<int32_t>;

// An integer as far up as x is among the floats: comparisons also place NaN, at either end.
int32_t ordered(float x) {
  const auto bits = std::bit_cast<int32_t>(x + 0.0f);  // -0 is 0
  return bits < 0 ? bits ^ Limits::max() : bits;
}

// Sixteen rows side by side; every feature twice, unknown as the least and as the greatest.
NEGFAST_CLONES void answer_lanes(const std::vector<Trees::Split>& splits, const std::vector<size_t>& ends,
                                 size_t leaves, const float* value, const int32_t* placed, float* out) {
  double total[kLanes]{};
  const Trees::Split* split = splits.data();
  for (const size_t end : ends) {
    Bits left = ~Bits{};
    for (const auto* last = splits.data() + end; split != last; ++split) {
      Bits asked;
      std::memcpy(&asked, placed + split->place, sizeof asked);
      left &= ~((asked > split->above) & split->left_leaves);
    }
    for (size_t lane = 0; lane < kLanes; ++lane)
      total[lane] += value[std::countr_zero(static_cast<uint32_t>(left[lane]))];
    value += leaves;
  }
  std::copy_n(total, kLanes, out);
}

}  // namespace

Trees::Trees(size_t trees, size_t splits, const int32_t* feature, const float* threshold, const bool* unknown_right,
             const int32_t* left_leaves, const float* value)
    : leaves_(splits + 1), value_(value, value + trees * (splits + 1)) {
  for (size_t tree = 0; tree < trees; ++tree) {
    for (size_t k = tree * splits; k < (tree + 1) * splits; ++k) {
      if (!left_leaves[k]) continue;
      const auto column = static_cast<size_t>(feature[k]);
      features_ = std::max(features_, column + 1);
      const auto place = static_cast<uint32_t>((2 * column + unknown_right[k]) * kLanes);
      splits_.push_back({ordered(threshold[k]), left_leaves[k], place});
    }
    ends_.push_back(splits_.size());
  }
}

void Trees::logits(size_t rows, size_t width, const float* features, float* out, unsigned threads) const {
  parallel_rows(rows, threads, [&](size_t start, size_t count) {
    Aligned<int32_t> placed(2 * features_ * kLanes);
    float totals[kLanes];
    for (size_t first = start; first < start + count; first += kLanes) {
      const size_t lanes = std::min(kLanes, start + count - first);
      for (size_t lane = 0; lane < lanes; ++lane) {
        for (size_t f = 0; f < features_; ++f) {
          const float x = features[(first + lane) * width + f];
          int32_t* at = placed.data() + 2 * f * kLanes + lane;
          at[0] = std::isnan(x) ? Limits::min() : ordered(x);
          at[kLanes] = std::isnan(x) ? Limits::max() : at[0];
        }
      }
      answer_lanes(splits_, ends_, leaves_, value_.data(), placed.data(), totals);
      std::copy_n(totals, lanes, out + first);
    }
  });
}

}  // namespace negfast
