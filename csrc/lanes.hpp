// Sixteen floats at once, in however many registers the CPU has for them.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#define NEGFAST_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__gnu_linux__)
#define NEGFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define NEGFAST_CLONES
#endif

namespace negfast {

constexpr size_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Half __attribute__((vector_size(kLanes / 2 * sizeof(float))));
typedef float Quarter __attribute__((vector_size(kLanes / 4 * sizeof(float))));
typedef int32_t Bits __attribute__((vector_size(kLanes * sizeof(int32_t))));

NEGFAST_INLINE Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

NEGFAST_INLINE void store(float* to, const Lanes& lanes) { std::memcpy(to, &lanes, sizeof lanes); }

NEGFAST_INLINE float sum(const Lanes& lanes) {
  const auto half = std::bit_cast<std::array<Half, 2>>(lanes);
  const auto quarter = std::bit_cast<std::array<Quarter, 2>>(half[0] + half[1]);
  const Quarter last = quarter[0] + quarter[1];
  return (last[0] + last[2]) + (last[1] + last[3]);
}

template <class T>
struct CacheLines {  // memory that begins where a cache line does
  using value_type = T;
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, std::align_val_t(64)); }
  bool operator==(const CacheLines&) const = default;
};
template <class T>
using Aligned = std::vector<T, CacheLines<T>>;

}  // namespace negfast
