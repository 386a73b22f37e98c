// The verdict (negfast.model.verdict) for inference on the CPU. What a row gets does not depend on the rows beside it, to
// the bit.
#pragma once

#include <cstddef>
#include <vector>

#include "lanes.hpp"

namespace negfast {

constexpr size_t kMembers = 4, kWidth = 32;  // networks of the deep part, units of a layer of each

// The first layer of a piecewise-linear encoding is itself piecewise linear: a row of a table at every edge of a
// feature's bins, between which a value lies.
class Verdict {
 public:
  // edges float32 [features, bins + 1]; first [members * width, features * (bins + 1)]; second [members, in, out];
  // biases and last [members * width]; wide [features * (bins + 1)].
  Verdict(size_t features, size_t bins, const float* edges, const float* first, const float* first_bias,
          const float* second, const float* second_bias, const float* last, const float* wide, float wide_bias);

  size_t features() const { return features_; }
  // Logits [rows] of features [rows, features], NaN where unknown.
  void logits(size_t rows, const float* features, float* out, unsigned threads) const;

 private:
  size_t features_, bins_, stride_;
  std::vector<float> edges_, bias_, second_, second_bias_, last_;
  Aligned<float> table_;
  float wide_bias_;
};

}  // namespace negfast
