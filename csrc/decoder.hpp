// The built-in decoder (negfast.model.qwen3) for inference on the CPU, without gradients.
//
// What a row gets does not depend on the rows beside it, to the bit: every number is summed in one order, in which a key
// counts at its position, whether it is one of a prompt or of a completion.
//
// Products are of bfloat16 numbers summed in float32 where the CPU multiplies them (AVX512_BF16), else of float32.
// Everything between them, and attention, is in float32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "lanes.hpp"

namespace negfast {

bool has_bfloat16();  // whether the CPU multiplies bfloat16 numbers

// Sums [rows, width] of rows of ``table`` [.., width]: those that ``place`` [rows, count] names, without ``none``.
void sum_rows(const float* table, size_t width, const int64_t* place, size_t rows, size_t count, int64_t none, float* out);

// A matrix that rows are multiplied by, in panels of columns that lie as the CPU reads them.
class Weights {
 public:
  Weights() = default;
  Weights(const float* weight, size_t out, size_t in, bool bfloat16);  // weight [out, in] of a linear layer

 private:
  friend struct Product;
  size_t out_ = 0, in_ = 0;
  bool bfloat16_ = false;
  Aligned<uint32_t> panels_;  // of 32 columns each: [in][32] float32, or [in / 2][32] pairs of bfloat16
};

struct DecoderShape {
  size_t hidden, heads, kv_heads, head_dim, intermediate;
  float eps;
};

struct LayerWeights {  // float32 [out, in], norms [size]
  const float *input_norm, *query, *key, *value, *query_norm, *key_norm, *out, *post_norm, *gate, *up, *down;
};

// What attends: A completions of n new tokens each, and the prompts that they branch off.
struct Attending {
  const float* query;                  // [A, n, heads, head_dim]
  const float *key, *value;            // [T, kv_heads, head_dim] of the packed prompts
  std::span<const int32_t> offsets;    // [B + 1] of these
  std::span<const int64_t> prompt;     // [A], of each completion, ascending
  std::span<const int32_t> prefix;     // [A], tokens of it that the completion sees
  const float *own_key, *own_value;    // [A, own, kv_heads, head_dim]: the completions' tokens, the new ones last
  size_t own, tokens;                  // tokens: n
};

class Decoder {
 public:
  Decoder(const DecoderShape& shape, bool bfloat16);
  void add_layer(const LayerWeights& weights);

  const DecoderShape& shape() const { return shape_; }
  size_t layers() const { return layers_.size(); }

  // Queries [N, heads, head_dim], keys and values [N, kv_heads, head_dim] of hidden states [N, hidden] whose positions'
  // rotations are cos and sin [N, head_dim / 2].
  void project(size_t layer, size_t rows, const float* hidden, const float* cos, const float* sin, float* query,
               float* key, float* value, unsigned threads) const;
  // Attention [A, n, heads, head_dim].
  void attend(const Attending& attending, float* out, unsigned threads) const;
  // Adds to hidden states [N, hidden] what a layer makes of them and of attention [N, heads, head_dim].
  void finish(size_t layer, size_t rows, const float* attention, float* hidden, unsigned threads) const;
  // RMSNorm of hidden states [N, hidden], in place.
  void norm(size_t rows, const float* weight, float* hidden) const;

 private:
  struct Layer {
    std::vector<float> input_norm, query_norm, key_norm, post_norm;
    Weights project, out, gate, up, down;
  };
  DecoderShape shape_;
  bool bfloat16_;
  std::vector<Layer> layers_;
};

}  // namespace negfast
