// Reading and writing little-endian bit streams: the first bit is the lowest bit of the first byte.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace negfast {

inline uint64_t load64(const uint8_t* p) {
  uint64_t x;
  std::memcpy(&x, p, 8);
  return x;
}

inline uint64_t low_bits(uint64_t x, unsigned n) { return x & ((uint64_t{1} << n) - 1); }  // n < 64

// Writes through a pointer to room enough: a put may touch the 8 bytes after the stream's end so far.
class BitWriter {
 public:
  explicit BitWriter(uint8_t* out) : out_(out) {}

  void put(uint64_t value, unsigned n) {  // n <= 56, value < 2^n
    pending_ |= value << used_;
    used_ += n;
    std::memcpy(out_, &pending_, 8);
    out_ += used_ >> 3;
    pending_ >>= used_ & ~7u;
    used_ &= 7;
  }

  // Ends the stream on a byte boundary and returns its end.
  uint8_t* flush() {
    if (used_ > 0) *out_++ = static_cast<uint8_t>(pending_);
    pending_ = 0;
    used_ = 0;
    return out_;
  }

 private:
  uint8_t* out_;
  uint64_t pending_ = 0;
  unsigned used_ = 0;
};

// Fixed-width numbers, one after another.
inline std::vector<uint8_t> pack_bits(const std::vector<uint32_t>& values, int width) {
  std::vector<uint8_t> out(values.size() * width / 8 + 9);
  BitWriter writer(out.data());
  for (uint32_t v : values) writer.put(v, width);
  out.resize(writer.flush() - out.data());
  return out;
}

inline void unpack_bits(const uint8_t* bytes, size_t size, int width, uint32_t* out, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const uint64_t bit = i * width;
    uint64_t word = 0;
    const size_t at = bit >> 3;
    if (at + 8 <= size)
      word = load64(bytes + at);
    else if (at < size)
      std::memcpy(&word, bytes + at, size - at);
    out[i] = static_cast<uint32_t>(low_bits(word >> (bit & 7), width));
  }
}

}  // namespace negfast
