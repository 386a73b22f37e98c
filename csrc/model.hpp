// The statistics of a log's events and the codes made from them: what the encoder works with.
#pragma once

#include <cstdint>
#include <vector>

#include "bits.hpp"
#include "huffman.hpp"
#include "source.hpp"
#include "symbols.hpp"

namespace negfast {

// A prefix code over the symbols of numbers, each with a tag (only items have one, their feedback).
struct NumberCode {
  unsigned head_bits = 1;
  unsigned tags = 1;
  std::vector<uint8_t> lengths;  // of symbol * tags + tag
  std::vector<Code> codes;
  uint64_t bits = 0;  // what the counted numbers cost, extra bits included
};

// A number as it is written: its bits, lowest first, and in the highest byte how many there are, at most 43.
using Encoded = uint64_t;
inline constexpr unsigned kLengthShift = 56;

// What encoding needs of a NumberCode, small enough for registers: stores to a byte stream may alias
// anything that is reached through a pointer.
struct Encoder {
  const Code* codes;
  unsigned head_bits;

  explicit Encoder(const NumberCode& code) : codes(code.codes.data()), head_bits(code.head_bits) {}

  Encoded encode(uint64_t value, unsigned tag = 0, unsigned tags = 1) const {
    const Symbol symbol = to_symbol(value, head_bits);
    const Code code = codes[symbol.index * tags + tag];
    return code.bits | symbol.extra << code.length | uint64_t{code.length + symbol.extra_bits} << kLengthShift;
  }
};

struct ShardModel {
  std::vector<uint32_t> item_of_rank;  // items with events, most frequent first, ties by index
  std::vector<Encoded> item_codes;     // feedback * items + item
  int64_t time_base = 0;  // units
  int64_t time_last = 0;
  uint32_t time_unit = 1;
  bool withdrawals = false;  // whether an event takes a like or dislike back
  bool time_runs = false;  // whether (delta, run length) pairs are cheaper than a delta an event
  NumberCode item, delta, run;
  std::vector<uint64_t> stripe_events;
  uint64_t events = 0;
};

// Units since 1970; seconds before it round down too.
inline int64_t to_units(int64_t seconds, uint32_t unit) {
  if (unit == 1) return seconds;  // a division costs more than all else that is done with an event
  const int64_t quotient = seconds / static_cast<int64_t>(unit);
  return seconds % static_cast<int64_t>(unit) < 0 ? quotient - 1 : quotient;
}

// One pass over the source, which also checks it: throws ShardError for an item out of range, an
// unknown feedback, times out of order, too far from 1970 or 2^32 units apart.
ShardModel build_model(const EventSource& source, uint64_t items, uint32_t time_unit, unsigned threads);

}  // namespace negfast
