// Sixteen floats at once, in however many registers the CPU has for them.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

#define NEGFAST_INLINE inline __attribute__((always_inline))

namespace negfast {

constexpr size_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Half __attribute__((vector_size(kLanes / 2 * sizeof(float))));
typedef float Quarter __attribute__((vector_size(kLanes / 4 * sizeof(float))));
typedef int32_t Bits __attribute__((vector_size(kLanes * sizeof(int32_t))));

NEGFAST_INLINE float sum(const Lanes& lanes) {
  const auto half = std::bit_cast<std::array<Half, 2>>(lanes);
  const auto quarter = std::bit_cast<std::array<Quarter, 2>>(half[0] + half[1]);
  const Quarter last = quarter[0] + quarter[1];
  return (last[0] + last[2]) + (last[1] + last[3]);
}

}  // namespace negfast
