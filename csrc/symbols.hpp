// Numbers as (symbol, extra bits): small ones have a symbol each, larger ones share it with others of
// the same leading bits. With h head bits a value v >= 2^h is its top h bits, which the symbol stands
// for, and m = bit_length(v) - h extra bits.
#pragma once

#include <bit>
#include <cstdint>

namespace negfast {

struct Symbol {
  uint32_t index;
  unsigned extra_bits;
  uint64_t extra;
};

// Without branches: which values are small is what no branch predictor can know. (A maximum of two widths
// becomes a branch.)
inline Symbol to_symbol(uint64_t value, unsigned head_bits) {
  const unsigned extra_bits = std::bit_width(value | uint64_t{1} << (head_bits - 1)) - head_bits;
  const auto index = static_cast<uint32_t>((uint64_t{extra_bits} << (head_bits - 1)) + (value >> extra_bits));
  return {index, extra_bits, value & ((uint64_t{1} << extra_bits) - 1)};
}

struct SymbolRange {
  uint64_t first;  // the smallest value of the symbol
  unsigned extra_bits;
};

inline SymbolRange symbol_range(uint32_t symbol, unsigned head_bits) {
  const uint32_t half = 1u << (head_bits - 1);
  if (symbol < 2 * half) return {symbol, 0};
  const unsigned extra_bits = (symbol - 2 * half) / half + 1;
  const uint64_t head = half + (symbol - 2 * half) % half;
  return {head << extra_bits, extra_bits};
}

// Symbols that values below 2^value_bits can have.
inline uint32_t symbol_count(int value_bits, unsigned head_bits) {
  const uint32_t direct = 1u << head_bits;
  const int octaves = value_bits > static_cast<int>(head_bits) ? value_bits - static_cast<int>(head_bits) : 0;
  return direct + octaves * (direct / 2);
}

}  // namespace negfast
