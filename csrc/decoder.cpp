#include "decoder.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__) && defined(__gnu_linux__)
#include <immintrin.h>
#define NEGFAST_X86 1
#define NEGFAST_NO_LANES(x) asm("" : "+x"(x))  // lanes would round every product of a sum, fused steps do not
#else
#define NEGFAST_X86 0
#define NEGFAST_NO_LANES(x)
#endif

#include "lanes.hpp"
#include "parallel.hpp"

namespace negfast {
namespace {

constexpr size_t kPanel = 2 * kLanes;  // columns of weights that lie together
constexpr size_t kTile = 12, kFew = 4;  // rows that a panel is multiplied by at once: their sums fit into registers
constexpr size_t kBlock = kRowsAtOnce;  // rows whose intermediate results stay in the cache
static_assert(kBlock % kTile == 0);
constexpr size_t kQueries = 64;         // completions of a prompt whose attention is one piece of work

size_t whole(size_t count, size_t unit) { return (count + unit - 1) / unit * unit; }

NEGFAST_INLINE float square_sum(const float* x, size_t count) {
  Lanes total{};
  size_t k = 0;
  for (; k + kLanes <= count; k += kLanes) total += load(x + k) * load(x + k);
  float rest = 0;
  for (; k < count; ++k) rest += x[k] * x[k];
  return sum(total) + rest;
}

// To 1e-7 of the result, for x <= 88; 0 below -87.
NEGFAST_INLINE Lanes exponential(const Lanes& x) {
  constexpr float kRound = 1.5f * (1 << 23);  // added to a number it leaves no place for a fraction
  const Lanes low = Lanes{} - 87.0f;
  const Lanes within = x > low ? x : low;
  const Lanes power = (within * 1.44269504f + kRound) - kRound;
  const Lanes rest = (within - power * 0.693359375f) + power * 2.12194440e-4f;
  Lanes value = rest * (1.0f / 5040) + 1.0f / 720;
  value = value * rest + 1.0f / 120;
  value = value * rest + 1.0f / 24;
  value = value * rest + 1.0f / 6;
  value = value * rest + 0.5f;
  value = value * rest + 1.0f;
  value = value * rest + 1.0f;
  const Bits bits = (__builtin_convertvector(power, Bits) + 127) << 23;
  return x > low ? value * std::bit_cast<Lanes>(bits) : Lanes{};
}

NEGFAST_CLONES void sum_named(const float* table, size_t width, const int64_t* place, size_t rows, size_t count,
                              int64_t none, float* out) {
  for (size_t r = 0; r < rows; ++r, place += count, out += width) {
    std::fill(out, out + width, 0.0f);
    for (size_t k = 0; k < count; ++k)
      if (place[k] != none)
        for (size_t c = 0; c < width; ++c) out[c] += table[place[k] * width + c];
  }
}

// Products of a tile of rows and a panel: out [rows, kPanel] = a [rows, depth] * panel [depth, kPanel].
// Depth counts 32-bit words: a float32, or a pair of bfloat16.

template <size_t rows>
NEGFAST_INLINE void multiply_floats(const uint32_t* a, size_t stride, const uint32_t* panel, size_t depth, float* out) {
  const float* wide = reinterpret_cast<const float*>(a);
  const float* columns = reinterpret_cast<const float*>(panel);
  Lanes total[rows][2] = {};
  for (size_t k = 0; k < depth; ++k) {
    const Lanes left = load(columns + k * kPanel), right = load(columns + k * kPanel + kLanes);
#pragma GCC unroll 12
    for (size_t r = 0; r < rows; ++r) {
      total[r][0] += wide[r * stride + k] * left;
      total[r][1] += wide[r * stride + k] * right;
    }
  }
#pragma GCC unroll 12
  for (size_t r = 0; r < rows; ++r) {
    store(out + r * kPanel, total[r][0]);
    store(out + r * kPanel + kLanes, total[r][1]);
  }
}

// The same of fewer lanes at once, for CPUs with 16 registers of 8.
template <size_t rows>
NEGFAST_INLINE void multiply_narrow(const uint32_t* a, size_t stride, const uint32_t* panel, size_t depth, float* out) {
  const float* wide = reinterpret_cast<const float*>(a);
  const float* columns = reinterpret_cast<const float*>(panel);
  for (size_t first = 0; first < kPanel; first += kLanes)
    for (size_t r = 0; r < rows; r += kFew) {
      Lanes total[kFew] = {};
      for (size_t k = 0; k < depth; ++k) {
        const Lanes column = load(columns + k * kPanel + first);
#pragma GCC unroll 4
        for (size_t i = 0; i < kFew; ++i) total[i] += wide[(r + i) * stride + k] * column;
      }
      for (size_t i = 0; i < kFew; ++i) store(out + (r + i) * kPanel + first, total[i]);
    }
}

using Multiply = void (*)(const uint32_t*, size_t, const uint32_t*, size_t, float*);
struct Kernels {
  Multiply tile, few;  // of kTile and of kFew rows
};

#if NEGFAST_X86
#define NEGFAST_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define NEGFAST_BFLOAT16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16")))
NEGFAST_AVX512 void tile_floats(const uint32_t* a, size_t stride, const uint32_t* panel, size_t depth, float* out) {
  multiply_floats<kTile>(a, stride, panel, depth, out);
}
NEGFAST_AVX512 void few_floats(const uint32_t* a, size_t stride, const uint32_t* panel, size_t depth, float* out) {
  multiply_floats<kFew>(a, stride, panel, depth, out);
}

template <size_t rows>
NEGFAST_BFLOAT16 void multiply_pairs(const uint32_t* a, size_t stride, const uint32_t* panel, size_t depth,
                                     float* out) {
  __m512 total[rows][2];
#pragma GCC unroll 12
  for (size_t r = 0; r < rows; ++r) total[r][0] = total[r][1] = _mm512_setzero_ps();
  for (size_t k = 0; k < depth; ++k) {
    const auto left = (__m512bh)_mm512_loadu_si512(panel + k * kPanel);
    const auto right = (__m512bh)_mm512_loadu_si512(panel + k * kPanel + kLanes);
#pragma GCC unroll 12
    for (size_t r = 0; r < rows; ++r) {
      const auto pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * stride + k]));
      total[r][0] = _mm512_dpbf16_ps(total[r][0], pair, left);
      total[r][1] = _mm512_dpbf16_ps(total[r][1], pair, right);
    }
  }
#pragma GCC unroll 12
  for (size_t r = 0; r < rows; ++r) {
    _mm512_storeu_ps(out + r * kPanel, total[r][0]);
    _mm512_storeu_ps(out + r * kPanel + kLanes, total[r][1]);
  }
}
#endif

NEGFAST_CLONES void tile_narrow(const uint32_t* a, size_t stride, const uint32_t* panel, size_t depth, float* out) {
  multiply_narrow<kTile>(a, stride, panel, depth, out);
}
NEGFAST_CLONES void few_narrow(const uint32_t* a, size_t stride, const uint32_t* panel, size_t depth, float* out) {
  multiply_narrow<kFew>(a, stride, panel, depth, out);
}

Kernels kernels(bool bfloat16) {
#if NEGFAST_X86
  if (bfloat16) return {multiply_pairs<kTile>, multiply_pairs<kFew>};
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) return {tile_floats, few_floats};
#endif
  (void)bfloat16;
  return {tile_narrow, few_narrow};
}

const Kernels kOfFloats = kernels(false);

// out [rows, kPanel] for any number of rows: ``a`` and ``out`` have room for a multiple of kFew.
NEGFAST_INLINE void multiply(const Kernels& with, size_t rows, const uint32_t* a, size_t stride, const uint32_t* panel,
                             size_t depth, float* out) {
  size_t r = 0;
  for (; r + kTile <= rows; r += kTile) with.tile(a + r * stride, stride, panel, depth, out + r * kPanel);
  for (; r < rows; r += kFew) with.few(a + r * stride, stride, panel, depth, out + r * kPanel);
}

// To the nearest, ties to even; NaN stays NaN as long as its first bits say so.
NEGFAST_INLINE uint32_t rounded(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Memory that is kept from call to call: a thread's own, as large as was ever needed.
template <class Kept>
auto scratch(Kept& kept, size_t count) {
  if (kept.size() < count) kept.resize(count);
  return kept.data();
}

}  // namespace

bool has_bfloat16() {
#if NEGFAST_X86
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

void sum_rows(const float* table, size_t width, const int64_t* place, size_t rows, size_t count, int64_t none,
              float* out) {
  sum_named(table, width, place, rows, count, none, out);
}

Weights::Weights(const float* weight, size_t out, size_t in, bool bfloat16) : out_(out), in_(in), bfloat16_(bfloat16) {
  const size_t panels = whole(out, kPanel) / kPanel, depth = bfloat16 ? whole(in, 2) / 2 : in;
  panels_.assign(panels * depth * kPanel, 0);
  for (size_t o = 0; o < out; ++o)
    for (size_t k = 0; k < in; ++k) {
      const float value = weight[o * in + k];
      uint32_t* panel = panels_.data() + o / kPanel * depth * kPanel + o % kPanel;
      if (bfloat16)
        panel[k / 2 * kPanel] |= rounded(value) << (k % 2 * 16);
      else
        panel[k * kPanel] = std::bit_cast<uint32_t>(value);
    }
}

// Rows as a product reads them, and its results.
struct Product {
  const Weights& weights;
  Kernels with;
  size_t depth;  // words of a row

  explicit Product(const Weights& by)
      : weights(by), with(kernels(by.bfloat16_)), depth(by.bfloat16_ ? whole(by.in_, 2) / 2 : by.in_) {}

  size_t panels() const { return whole(weights.out_, kPanel) / kPanel; }
  size_t columns(size_t panel) const { return std::min(kPanel, weights.out_ - panel * kPanel); }

  // Writes columns first to first + count of a row of what is multiplied, count even where first + count is not the end.
  NEGFAST_INLINE void write(uint32_t* row, size_t first, const float* values, size_t count) const {
    if (!weights.bfloat16_) {
      std::memcpy(row + first, values, count * sizeof(float));
      return;
    }
    auto* to = reinterpret_cast<uint16_t*>(row) + first;
    for (size_t k = 0; k < count; ++k) to[k] = static_cast<uint16_t>(rounded(values[k]));
    if (first + count == weights.in_ && weights.in_ % 2) to[count] = 0;
  }

  NEGFAST_INLINE void panel(size_t number, size_t rows, const uint32_t* a, float* out) const {
    multiply(with, rows, a, depth, weights.panels_.data() + number * depth * kPanel, depth, out);
  }

  // Adds the products of rows to ``to`` [rows, out].
  NEGFAST_INLINE void add(size_t rows, const uint32_t* a, float* out, float* to) const {
    for (size_t p = 0; p < panels(); ++p) {
      panel(p, rows, a, out);
      for (size_t r = 0; r < rows; ++r) {
        const float* from = out + r * kPanel;
        float* row = to + r * weights.out_ + p * kPanel;
        if (columns(p) == kPanel)
          for (size_t c = 0; c < kPanel; c += kLanes) store(row + c, load(row + c) + load(from + c));
        else
          for (size_t c = 0; c < columns(p); ++c) row[c] += from[c];
      }
    }
  }
};

namespace {

NEGFAST_INLINE void normalise(const float* x, const float* weight, size_t count, float eps, float* out) {
  const float scale = 1 / std::sqrt(square_sum(x, count) / static_cast<float>(count) + eps);
  size_t k = 0;
  for (; k + kLanes <= count; k += kLanes) store(out + k, load(weight + k) * (load(x + k) * scale));
  for (; k < count; ++k) out[k] = weight[k] * (x[k] * scale);
}

// The rows of a block, normalised, as ``product`` reads them.
NEGFAST_INLINE void write_normalised(const Product& product, size_t rows, const float* x, const std::vector<float>& weight,
                                     float eps, float* row, uint32_t* a) {
  const size_t hidden = weight.size();
  for (size_t r = 0; r < rows; ++r) {
    normalise(x + r * hidden, weight.data(), hidden, eps, row);
    product.write(a + r * product.depth, 0, row, hidden);
  }
}

// Normalises a head and turns it.
NEGFAST_INLINE void turn(const float* x, const float* weight, const float* cos, const float* sin, size_t size, float eps,
                         float* row, float* out) {
  const size_t half = size / 2;
  normalise(x, weight, size, eps, row);
  size_t k = 0;
  for (; k + kLanes <= half; k += kLanes) {
    const Lanes first = load(row + k), second = load(row + half + k), c = load(cos + k), s = load(sin + k);
    store(out + k, first * c - second * s);
    store(out + half + k, second * c + first * s);
  }
  for (; k < half; ++k) {
    out[k] = row[k] * cos[k] - row[half + k] * sin[k];
    out[half + k] = row[half + k] * cos[k] + row[k] * sin[k];
  }
}

thread_local Aligned<uint32_t> rows_a, rows_b;  // what is multiplied
thread_local Aligned<float> results, more_results, line, all_heads, keys_kept, values_kept;

NEGFAST_CLONES void project_block(const Product& product, const DecoderShape& shape, const std::vector<float>& input_norm,
                                  const std::vector<float>& query_norm, const std::vector<float>& key_norm, size_t rows,
                                  const float* hidden, const float* cos, const float* sin, float* query, float* key,
                                  float* value) {
  const size_t size = shape.head_dim, of_queries = shape.heads * size, of_keys = shape.kv_heads * size;
  const size_t width = of_queries + 2 * of_keys;
  uint32_t* a = scratch(rows_a, whole(rows, kFew) * product.depth);
  float* out = scratch(results, whole(rows, kFew) * kPanel);
  float* row = scratch(line, std::max(shape.hidden, size));
  float* all = scratch(all_heads, rows * width);
  write_normalised(product, rows, hidden, input_norm, shape.eps, row, a);
  for (size_t p = 0; p < product.panels(); ++p) {
    product.panel(p, rows, a, out);
    for (size_t r = 0; r < rows; ++r)
      std::memcpy(all + r * width + p * kPanel, out + r * kPanel, product.columns(p) * sizeof(float));
  }
  for (size_t r = 0; r < rows; ++r) {
    const float* of_row = all + r * width;
    const float *c = cos + r * size / 2, *s = sin + r * size / 2;
    for (size_t h = 0; h < shape.heads; ++h)
      turn(of_row + h * size, query_norm.data(), c, s, size, shape.eps, row, query + r * of_queries + h * size);
    for (size_t h = 0; h < shape.kv_heads; ++h)
      turn(of_row + of_queries + h * size, key_norm.data(), c, s, size, shape.eps, row, key + r * of_keys + h * size);
    std::memcpy(value + r * of_keys, of_row + of_queries + of_keys, of_keys * sizeof(float));
  }
}

NEGFAST_CLONES void finish_block(const Product& out_product, const Product& gate, const Product& up, const Product& down,
                                 const DecoderShape& shape, const std::vector<float>& post_norm, size_t rows,
                                 const float* attention, float* hidden) {
  const size_t padded = whole(rows, kFew), heads = shape.heads * shape.head_dim;
  uint32_t* a = scratch(rows_a, padded * std::max(out_product.depth, gate.depth));
  uint32_t* b = scratch(rows_b, padded * down.depth);
  float* left = scratch(results, padded * kPanel);
  float* right = scratch(more_results, padded * kPanel);
  float* row = scratch(line, std::max(shape.hidden, kPanel));
  for (size_t r = 0; r < rows; ++r) out_product.write(a + r * out_product.depth, 0, attention + r * heads, heads);
  out_product.add(rows, a, left, hidden);
  write_normalised(gate, rows, hidden, post_norm, shape.eps, row, a);
  for (size_t p = 0; p < gate.panels(); ++p) {
    gate.panel(p, rows, a, left);
    up.panel(p, rows, a, right);
    for (size_t r = 0; r < rows; ++r) {
      for (size_t c = 0; c < kPanel; c += kLanes) {
        const Lanes of_gate = load(left + r * kPanel + c);
        store(row + c, of_gate / (1.0f + exponential(-of_gate)) * load(right + r * kPanel + c));
      }
      down.write(b + r * down.depth, p * kPanel, row, gate.columns(p));
    }
  }
  down.add(rows, b, left, hidden);
}

NEGFAST_CLONES void norm_rows(size_t rows, const float* weight, size_t count, float eps, float* hidden) {
  for (size_t r = 0; r < rows; ++r) normalise(hidden + r * count, weight, count, eps, hidden + r * count);
}

// exp(scale * score - the largest) of ``count`` scores in place, zeros up to ``end``, a multiple of kLanes; their sum.
NEGFAST_INLINE float soften(float* scores, size_t count, size_t end, float scale) {
  std::fill(scores + count, scores + end, -std::numeric_limits<float>::infinity());
  Lanes most = load(scores);
  for (size_t k = kLanes; k < end; k += kLanes) {
    const Lanes here = load(scores + k);
    most = here > most ? here : most;
  }
  const auto half = std::bit_cast<std::array<Half, 2>>(most);
  const auto quarter = std::bit_cast<std::array<Quarter, 2>>(half[0] > half[1] ? half[0] : half[1]);
  const Quarter last = quarter[0] > quarter[1] ? quarter[0] : quarter[1];
  const float largest = std::max(std::max(last[0], last[2]), std::max(last[1], last[3]));
  Lanes total{};
  for (size_t k = 0; k < end; k += kLanes) {
    const Lanes weight = exponential((load(scores + k) - largest) * scale);
    store(scores + k, weight);
    total += weight;
  }
  return sum(total);
}

// Completions first to last, of one prompt.
NEGFAST_CLONES void attend_piece(const Attending& given, const DecoderShape& shape, size_t first, size_t last, float* out) {
  const size_t size = shape.head_dim, kv_heads = shape.kv_heads, together = shape.heads / kv_heads;
  const size_t start = given.offsets[given.prompt[first]], tokens = (last - first) * given.tokens;
  const size_t rows = tokens * together, parts = whole(size, kPanel) / kPanel;
  size_t seen = 0;
  for (size_t c = first; c < last; ++c) seen = std::max<size_t>(seen, given.prefix[c]);
  const size_t columns = whole(seen + given.own, kPanel), panels = whole(seen, kPanel) / kPanel;
  const float scale = 1 / std::sqrt(static_cast<float>(size));
  uint32_t* queries = scratch(rows_a, whole(rows, kFew) * size);
  auto* scores = reinterpret_cast<float*>(scratch(rows_b, whole(rows, kFew) * columns));
  float* some = scratch(results, whole(rows, kFew) * kPanel);
  float* keys = scratch(keys_kept, panels * kPanel * size);
  float* values = scratch(values_kept, parts * seen * kPanel);
  float* own = scratch(line, rows * (given.own + 1));  // weights of own tokens, and the sum of all
  for (size_t h = 0; h < kv_heads; ++h) {
    for (size_t t = 0; t < tokens; ++t)
      std::memcpy(queries + t * together * size,
                  given.query + ((first * given.tokens + t) * shape.heads + h * together) * size,
                  together * size * sizeof(float));
    if (seen % kPanel) std::fill(keys + (panels - 1) * kPanel * size, keys + panels * kPanel * size, 0.0f);
    for (size_t k = 0; k < seen; ++k) {
      const size_t at = ((start + k) * kv_heads + h) * size;
      for (size_t d = 0; d < size; ++d) keys[(k / kPanel * size + d) * kPanel + k % kPanel] = given.key[at + d];
      for (size_t p = 0; p < parts; ++p) {
        const size_t count = std::min(kPanel, size - p * kPanel);
        float* to = values + (p * seen + k) * kPanel;
        std::memcpy(to, given.value + at + p * kPanel, count * sizeof(float));
        std::fill(to + count, to + kPanel, 0.0f);
      }
    }
    for (size_t p = 0; p < panels; ++p) {
      multiply(kOfFloats, rows, queries, size, reinterpret_cast<const uint32_t*>(keys + p * kPanel * size), size, some);
      for (size_t r = 0; r < rows; ++r)
        std::memcpy(scores + r * columns + p * kPanel, some + r * kPanel, kPanel * sizeof(float));
    }
    for (size_t r = 0; r < rows; ++r) {
      const size_t token = r / together, c = first + token / given.tokens, prefix = given.prefix[c];
      const size_t mine = given.own == 0 ? 0 : given.own - given.tokens + token % given.tokens + 1;
      const float* query = reinterpret_cast<const float*>(queries) + r * size;
      float* of_row = scores + r * columns;
      for (size_t k = 0; k < mine; ++k) {  // in the order of a product's, so that a key counts as one of a prompt
        const float* key = given.own_key + ((c * given.own + k) * kv_heads + h) * size;
        float score = 0;
        for (size_t d = 0; d < size; ++d) {
          score += query[d] * key[d];
          NEGFAST_NO_LANES(score);
        }
        of_row[prefix + k] = score;
      }
      const size_t end = whole(prefix + mine, kLanes);
      own[r * (given.own + 1) + given.own] = soften(of_row, prefix + mine, end, scale);
      std::fill(of_row + end, of_row + columns, 0.0f);
      std::copy_n(of_row + prefix, given.own, own + r * (given.own + 1));
      std::fill(of_row + prefix, of_row + prefix + given.own, 0.0f);
    }
    for (size_t p = 0; p < parts; ++p) {
      const size_t count = std::min(kPanel, size - p * kPanel);
      multiply(kOfFloats, rows, reinterpret_cast<const uint32_t*>(scores), columns,
               reinterpret_cast<const uint32_t*>(values + p * seen * kPanel), seen, some);
      for (size_t r = 0; r < rows; ++r) {
        const size_t token = r / together, c = first + token / given.tokens;
        const float* weights = own + r * (given.own + 1);
        float* of_row = some + r * kPanel;
        const float* value = given.own_value + (c * given.own * kv_heads + h) * size + p * kPanel;
        float* to = out + ((first * given.tokens + token) * shape.heads + h * together + r % together) * size + p * kPanel;
        const float share = 1 / weights[given.own];
        size_t d = 0;
        for (; d + kLanes <= count; d += kLanes) {
          Lanes total = load(of_row + d);
          for (size_t k = 0; k < given.own; ++k) total += weights[k] * load(value + k * kv_heads * size + d);
          store(to + d, total * share);
        }
        for (; d < count; ++d) {
          float total = of_row[d];
          for (size_t k = 0; k < given.own; ++k) {
            total += weights[k] * value[k * kv_heads * size + d];
            NEGFAST_NO_LANES(total);
          }
          to[d] = total * share;
        }
      }
    }
  }
}

}  // namespace

Decoder::Decoder(const DecoderShape& shape, bool bfloat16) : shape_(shape), bfloat16_(bfloat16) {}

void Decoder::add_layer(const LayerWeights& given) {
  const auto copied = [](const float* from, size_t count) { return std::vector<float>(from, from + count); };
  const size_t hidden = shape_.hidden, size = shape_.head_dim;
  const size_t queries = shape_.heads * size, keys = shape_.kv_heads * size;
  std::vector<float> all = copied(given.query, queries * hidden);
  all.insert(all.end(), given.key, given.key + keys * hidden);
  all.insert(all.end(), given.value, given.value + keys * hidden);
  layers_.push_back({copied(given.input_norm, hidden),
                     copied(given.query_norm, size),
                     copied(given.key_norm, size),
                     copied(given.post_norm, hidden),
                     {all.data(), queries + 2 * keys, hidden, bfloat16_},
                     {given.out, hidden, queries, bfloat16_},
                     {given.gate, shape_.intermediate, hidden, bfloat16_},
                     {given.up, shape_.intermediate, hidden, bfloat16_},
                     {given.down, hidden, shape_.intermediate, bfloat16_}});
}

void Decoder::project(size_t number, size_t rows, const float* hidden, const float* cos, const float* sin, float* query,
                      float* key, float* value, unsigned threads) const {
  const Layer& layer = layers_[number];
  const Product product(layer.project);
  const size_t size = shape_.head_dim, keys = shape_.kv_heads * size;
  parallel_rows(rows, threads, [&](size_t first, size_t count) {
    project_block(product, shape_, layer.input_norm, layer.query_norm, layer.key_norm, count,
                  hidden + first * shape_.hidden, cos + first * size / 2, sin + first * size / 2,
                  query + first * shape_.heads * size, key + first * keys, value + first * keys);
  });
}

void Decoder::attend(const Attending& given, float* out, unsigned threads) const {
  std::vector<std::pair<size_t, size_t>> pieces;
  const size_t count = given.prompt.size();
  for (size_t first = 0, last; first < count; first = last) {
    for (last = first + 1; last < count && last - first < kQueries && given.prompt[last] == given.prompt[first];) ++last;
    pieces.emplace_back(first, last);
  }
  threads = static_cast<unsigned>(std::min<size_t>(threads, 1 + count * given.tokens / kRowsAThread));
  parallel_for(pieces.size(), threads, [&](size_t k, unsigned) {
    attend_piece(given, shape_, pieces[k].first, pieces[k].second, out);
  });
}

void Decoder::finish(size_t number, size_t rows, const float* attention, float* hidden, unsigned threads) const {
  const Layer& layer = layers_[number];
  const Product out(layer.out), gate(layer.gate), up(layer.up), down(layer.down);
  parallel_rows(rows, threads, [&](size_t first, size_t count) {
    finish_block(out, gate, up, down, shape_, layer.post_norm, count,
                 attention + first * shape_.heads * shape_.head_dim, hidden + first * shape_.hidden);
  });
}

void Decoder::norm(size_t rows, const float* weight, float* hidden) const {
  norm_rows(rows, weight, shape_.hidden, shape_.eps, hidden);
}

}  // namespace negfast
