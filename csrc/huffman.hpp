// Length-limited canonical Huffman codes, and the table that decodes a symbol with its extra bits.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace negfast {

inline constexpr unsigned kMaxCodeBits = 11;  // the decode table is 2^11 entries: 16 KiB, half of a small L1

// The optimal code lengths under the limit (package-merge); 0 where the count is 0.
// Ties go to the lower symbol, so that the same counts give the same code everywhere.
std::vector<uint8_t> code_lengths(std::span<const uint64_t> counts);

struct Code {
  uint16_t bits;  // to be written lowest bit first
  uint8_t length;
};

// Throws ShardError where the lengths are not those of a complete prefix code.
std::vector<Code> canonical_codes(std::span<const uint8_t> lengths);

// Bits that the counts cost under these lengths, without extra bits.
uint64_t coded_bits(std::span<const uint64_t> counts, std::span<const uint8_t> lengths);

// Everything that one look-up tells: bits 0-7 where the extra bits start, which is the code's length; 8-15
// how many there are (so that the low half is a control word of the bit-field instruction); 16-23 a tag;
// 24-55 the symbol's smallest value; 56-63 code and extra bits together.
using DecodeEntry = uint64_t;

struct DecodeTable {
  std::vector<DecodeEntry> entries;  // 2^kMaxCodeBits
  unsigned max_bits = 0;             // the longest symbol, extra bits included
};

// Symbol s stands for values of symbol_range(s / tags, head_bits), with tag s % tags.
DecodeTable decode_table(std::span<const uint8_t> lengths, unsigned head_bits, unsigned tags);

}  // namespace negfast
