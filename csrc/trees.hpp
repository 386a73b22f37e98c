// Boosted trees (negfast.model.trees) for inference on the CPU. What a row gets depends neither on the rows beside it
// nor on the CPU, to the bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace negfast {

class Trees {
 public:
  static constexpr size_t kMostLeaves = 32;

  // feature, threshold, unknown_right and left_leaves are [trees, splits], value [trees, splits + 1].
  Trees(size_t trees, size_t splits, const int32_t* feature, const float* threshold, const bool* unknown_right,
        const int32_t* left_leaves, const float* value);

  size_t features() const { return features_; }  // that splits ask for, at least
  // Logits [rows] of features [rows, width], NaN where unknown.
  void logits(size_t rows, size_t width, const float* features, float* out, unsigned threads) const;

  struct Split {
    int32_t above;        // the threshold, as an integer in the order of floats
    int32_t left_leaves;  // bit l: leaf l, which a row that goes right cannot reach
    uint32_t place;       // of the feature among a block's, unknown as the least or the greatest
  };

 private:
  size_t features_ = 0, leaves_;
  std::vector<Split> splits_;  // of all trees, without those that rule out nothing
  std::vector<size_t> ends_;   // of each tree
  std::vector<float> value_;
};

}  // namespace negfast
