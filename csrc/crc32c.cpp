#include "crc32c.hpp"

#include <array>
#include <cstring>

#include "bits.hpp"

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace negfast {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;  // reflected

constexpr std::array<std::array<uint32_t, 256>, 8> make_tables() {
  std::array<std::array<uint32_t, 256>, 8> t{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int k = 0; k < 8; ++k) c = c & 1 ? (c >> 1) ^ kPolynomial : c >> 1;
    t[0][i] = c;
  }
  for (uint32_t i = 0; i < 256; ++i)
    for (int k = 1; k < 8; ++k) t[k][i] = (t[k - 1][i] >> 8) ^ t[0][t[k - 1][i] & 255];
  return t;
}
constexpr auto kTables = make_tables();

// Eight bytes at a time from eight tables.
uint32_t crc_portable(uint32_t crc, const uint8_t* p, size_t n) {
  for (; n >= 8; p += 8, n -= 8) {
    const uint64_t x = load64(p) ^ crc;
    crc = kTables[7][x & 255] ^ kTables[6][(x >> 8) & 255] ^ kTables[5][(x >> 16) & 255] ^
          kTables[4][(x >> 24) & 255] ^ kTables[3][(x >> 32) & 255] ^ kTables[2][(x >> 40) & 255] ^
          kTables[1][(x >> 48) & 255] ^ kTables[0][x >> 56];
  }
  for (; n > 0; ++p, --n) crc = (crc >> 8) ^ kTables[0][(crc ^ *p) & 255];
  return crc;
}

#if defined(__x86_64__)
// The CRC of `crc` followed by `kLane` zero bytes is linear in `crc`: four look-ups apply it.
constexpr size_t kLane = 1024;

constexpr std::array<std::array<uint32_t, 256>, 4> make_skip() {
  std::array<uint32_t, 32> column{};
  for (int bit = 0; bit < 32; ++bit) {
    uint32_t c = uint32_t{1} << bit;
    for (size_t i = 0; i < kLane; ++i) c = (c >> 8) ^ kTables[0][c & 255];
    column[bit] = c;
  }
  std::array<std::array<uint32_t, 256>, 4> t{};
  for (int byte = 0; byte < 4; ++byte)
    for (uint32_t i = 0; i < 256; ++i)
      for (int k = 0; k < 8; ++k)
        if (i >> k & 1) t[byte][i] ^= column[8 * byte + k];
  return t;
}

uint32_t skip_lane(uint32_t crc) {
  static const auto skip = make_skip();
  return skip[0][crc & 255] ^ skip[1][(crc >> 8) & 255] ^ skip[2][(crc >> 16) & 255] ^ skip[3][crc >> 24];
}

// The instruction has a latency of three cycles and a throughput of one: three lanes keep it busy.
__attribute__((target("sse4.2"))) uint32_t crc_sse42(uint32_t crc, const uint8_t* p, size_t n) {
  for (; n >= 3 * kLane; p += 3 * kLane, n -= 3 * kLane) {
    uint64_t a = crc, b = 0, c = 0;
    for (size_t i = 0; i < kLane; i += 8) {
      a = _mm_crc32_u64(a, load64(p + i));
      b = _mm_crc32_u64(b, load64(p + kLane + i));
      c = _mm_crc32_u64(c, load64(p + 2 * kLane + i));
    }
    crc = skip_lane(skip_lane(static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b)) ^ static_cast<uint32_t>(c);
  }
  uint64_t a = crc;
  for (; n >= 8; p += 8, n -= 8) a = _mm_crc32_u64(a, load64(p));
  crc = static_cast<uint32_t>(a);
  for (; n > 0; ++p, --n) crc = _mm_crc32_u8(crc, *p);
  return crc;
}
#endif

}  // namespace

uint32_t crc32c(const void* data, size_t size) {
  const auto* bytes = static_cast<const uint8_t*>(data);
#if defined(__x86_64__)
  static const bool has_sse42 = __builtin_cpu_supports("sse4.2");
  if (has_sse42) return ~crc_sse42(~0u, bytes, size);
#endif
  return ~crc_portable(~0u, bytes, size);
}

}  // namespace negfast
