// Random numbers, logarithms and powers with the same bits on every CPU.
#pragma once

#include <bit>
#include <cstdint>

#include "lanes.hpp"

namespace negfast {

NEGFAST_INLINE uint64_t mixed(uint64_t x) {  // SplitMix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The natural logarithm of a normal number, to 1e-10.
NEGFAST_INLINE double logarithm(double x) {
  const auto bits = std::bit_cast<uint64_t>(x) - std::bit_cast<uint64_t>(0.70710678118654752);
  const auto exponent = static_cast<int64_t>(bits) >> 52;
  const double m = std::bit_cast<double>(std::bit_cast<uint64_t>(x) - (static_cast<uint64_t>(exponent) << 52));
  const double s = (m - 1) / (m + 1), z = s * s;  // |s| < 0.172
  const double series =
      1 + z * (1. / 3 + z * (1. / 5 + z * (1. / 7 + z * (1. / 9 + z * (1. / 11 + z * (1. / 13))))));
  return static_cast<double>(exponent) * 0.69314718055994531 + 2 * s * series;
}

// What is left of 1 after so many seconds, to 1e-8.
NEGFAST_INLINE float left(int64_t seconds, double half_life) {
  const double x = static_cast<double>(seconds) / half_life;
  if (x >= 100) return 0;
  const auto whole = static_cast<int64_t>(x);
  const double z = (static_cast<double>(whole) + 0.5 - x) * 0.69314718055994531;  // |z| < 0.35
  double power = 1;
  for (int n = 8; n > 0; --n) power = 1 + power * z / n;
  const double half = std::bit_cast<double>(static_cast<uint64_t>(1023 - whole) << 52);  // 2^-whole
  return static_cast<float>(power * 0.70710678118654752 * half);
}

}  // namespace negfast
