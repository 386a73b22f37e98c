#include "trees.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
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

typedef int32_t Four __attribute__((vector_size(16)));  // what every CPU has; wider ones gain nothing here
constexpr size_t kFours = 4, kRows = 4 * kFours;

// Rows side by side; every feature twice, unknown as the least and as the greatest.
void answer_rows(const std::vector<Trees::Split>& splits, const std::vector<size_t>& ends, size_t leaves,
                 const float* value, const int32_t* placed, double* total) {
  std::fill_n(total, kRows, 0.0);
  const Trees::Split* split = splits.data();
  for (const size_t end : ends) {
    Four left[kFours];
    for (auto& rows : left) rows = ~Four{};
    for (const auto* last = splits.data() + end; split != last; ++split) {
#pragma GCC unroll 4
      for (size_t k = 0; k < kFours; ++k) {
        Four asked;
        std::memcpy(&asked, placed + split->place + 4 * k, sizeof asked);
        left[k] &= ~((asked > split->above) & split->left_leaves);
      }
    }
    for (size_t row = 0; row < kRows; ++row)
      total[row] += value[std::countr_zero(static_cast<uint32_t>(left[row / 4][row % 4]))];
    value += leaves;
  }
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
      const auto place = static_cast<uint32_t>((2 * column + unknown_right[k]) * kRows);
      splits_.push_back({ordered(threshold[k]), left_leaves[k], place});
    }
    ends_.push_back(splits_.size());
  }
}

void Trees::logits(size_t rows, size_t width, const float* features, float* out, unsigned threads) const {
  parallel_rows(rows, threads, [&](size_t start, size_t count) {
    std::vector<int32_t> placed(2 * features_ * kRows);
    double totals[kRows];
    for (size_t first = start; first < start + count; first += kRows) {
      const size_t here = std::min(kRows, start + count - first);
      for (size_t row = 0; row < here; ++row) {
        for (size_t f = 0; f < features_; ++f) {
          const float x = features[(first + row) * width + f];
          int32_t* at = placed.data() + 2 * f * kRows + row;
          at[0] = std::isnan(x) ? Limits::min() : ordered(x);
          at[kRows] = std::isnan(x) ? Limits::max() : at[0];
        }
      }
      answer_rows(splits_, ends_, leaves_, value_.data(), placed.data(), totals);
      std::copy_n(totals, here, out + first);
    }
  });
}

}  // namespace negfast
