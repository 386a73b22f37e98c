#include "huffman.hpp"

#include <algorithm>
#include <string>

#include "format.hpp"
#include "symbols.hpp"

namespace negfast {

std::vector<uint8_t> code_lengths(std::span<const uint64_t> counts) {
  std::vector<uint32_t> used;
  for (uint32_t s = 0; s < counts.size(); ++s)
    if (counts[s] > 0) used.push_back(s);
  std::vector<uint8_t> lengths(counts.size(), 0);
  if (used.empty()) return lengths;
  if (used.size() == 1) {
    lengths[used[0]] = 1;
    return lengths;
  }
  if (used.size() > (size_t{1} << kMaxCodeBits)) throw std::logic_error("more symbols than codes");
  std::stable_sort(used.begin(), used.end(), [&](uint32_t a, uint32_t b) { return counts[a] < counts[b]; });

  // A package is a weight and how often it holds each leaf; merging pairs of packages with the leaves
  // once for every bit of length leaves 2(n - 1) packages whose leaf counts are the code lengths.
  struct Package {
    uint64_t weight;
    std::vector<uint8_t> leaves;
  };
  auto leaf = [&](size_t i) {
    Package p{counts[used[i]], std::vector<uint8_t>(used.size(), 0)};
    p.leaves[i] = 1;
    return p;
  };
  std::vector<Package> level;
  for (unsigned bit = 0; bit < kMaxCodeBits; ++bit) {
    std::vector<Package> pairs;
    for (size_t i = 0; i + 1 < level.size(); i += 2) {
      Package p = std::move(level[i]);
      p.weight += level[i + 1].weight;
      for (size_t k = 0; k < used.size(); ++k) p.leaves[k] += level[i + 1].leaves[k];
      pairs.push_back(std::move(p));
    }
    level.clear();
    size_t next = 0;
    for (size_t i = 0; i < used.size(); ++i) {
      while (next < pairs.size() && pairs[next].weight < counts[used[i]]) level.push_back(std::move(pairs[next++]));
      level.push_back(leaf(i));
    }
    while (next < pairs.size()) level.push_back(std::move(pairs[next++]));
  }
  for (size_t i = 0; i < 2 * (used.size() - 1); ++i)
    for (size_t k = 0; k < used.size(); ++k) lengths[used[k]] += level[i].leaves[k];
  return lengths;
}

std::vector<Code> canonical_codes(std::span<const uint8_t> lengths) {
  uint32_t per_length[kMaxCodeBits + 1] = {};
  size_t used = 0;
  for (uint8_t n : lengths) {
    if (n > kMaxCodeBits) throw ShardError("code lengths: found " + std::to_string(n) + " bits, expected at most 11");
    if (n > 0) ++per_length[n], ++used;
  }
  uint32_t kraft = 0;
  for (unsigned n = 1; n <= kMaxCodeBits; ++n) kraft += per_length[n] << (kMaxCodeBits - n);
  const bool lone = used == 1 && per_length[1] == 1;
  if (used > 0 && !lone && kraft != 1u << kMaxCodeBits) throw ShardError("code lengths: not a complete prefix code");

  uint32_t next[kMaxCodeBits + 2] = {};
  for (unsigned n = 1; n <= kMaxCodeBits; ++n) next[n + 1] = (next[n] + per_length[n]) << 1;
  std::vector<Code> codes(lengths.size(), Code{0, 0});
  for (size_t s = 0; s < lengths.size(); ++s) {
    if (lengths[s] == 0) continue;
    uint32_t code = next[lengths[s]]++;
    uint32_t reversed = 0;
    for (unsigned k = 0; k < lengths[s]; ++k, code >>= 1) reversed = reversed << 1 | (code & 1);
    codes[s] = {static_cast<uint16_t>(reversed), lengths[s]};
  }
  return codes;
}

uint64_t coded_bits(std::span<const uint64_t> counts, std::span<const uint8_t> lengths) {
  uint64_t bits = 0;
  for (size_t s = 0; s < counts.size(); ++s) bits += counts[s] * lengths[s];
  return bits;
}

DecodeTable decode_table(std::span<const uint8_t> lengths, unsigned head_bits, unsigned tags) {
  const std::vector<Code> codes = canonical_codes(lengths);
  DecodeTable table;
  table.entries.assign(size_t{1} << kMaxCodeBits, 0);
  bool lone = true;
  for (uint32_t s = 0; s < codes.size(); ++s) {
    const unsigned length = codes[s].length;
    if (length == 0) continue;
    const SymbolRange range = symbol_range(s / tags, head_bits);
    const unsigned total = length + range.extra_bits;
    const DecodeEntry entry =
        uint64_t{total} << 56 | range.first << 24 | uint64_t{s % tags} << 16 | range.extra_bits << 8 | length;
    for (size_t slot = codes[s].bits; slot < table.entries.size(); slot += size_t{1} << length)
      table.entries[slot] = entry;
    lone = table.max_bits == 0;
    table.max_bits = std::max(table.max_bits, total);
  }
  // A lone symbol has the code 0; a 1 in its place decodes to it as well, never to nothing.
  if (lone && table.max_bits > 0)
    for (auto& entry : table.entries)
      if (entry == 0) entry = table.entries[0];
  return table;
}

}  // namespace negfast
