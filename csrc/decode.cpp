#include "decode.hpp"

// Shifts by a variable and masks are single instructions from BMI2 on: 6 % faster, chosen when loaded.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define NEGFAST_DISPATCH __attribute__((target_clones("arch=x86-64-v3", "default"), flatten))
#else
#define NEGFAST_DISPATCH
#endif

namespace negfast {
namespace {

// (delta, run length) pairs: most of the work is filling, so one stream at a time is enough.
void decode_time_runs(const ShardFile& file, const DecodeJob& job, int64_t* time) {
  const DecodeTable &deltas = file.delta_table(), &runs = file.run_table();
  const uint64_t limit = (file.size() - 8) * 8, unit = file.header().time_unit;
  uint64_t bit = job.begin * 8, units = static_cast<uint64_t>(file.header().time_base);
  auto number = [&](const DecodeTable& table) {
    if (bit > limit) file.damaged("a stream runs beyond the end of the file");
    const uint64_t window = load64(file.data() + (bit >> 3)) >> (bit & 7);
    const DecodeEntry entry = table.entries[low_bits(window, kMaxCodeBits)];
    bit += entry & 255;
    return (entry >> 24) + (low_bits(window, entry & 255) >> ((entry >> 8) & 63));
  };
  for (uint64_t done = 0; done < job.events;) {
    units += number(deltas);
    const uint64_t length = number(runs) + 1;
    if (length > job.events - done) file.damaged("a run of equal times is longer than its user's history");
    std::fill_n(time + job.at + done, length, static_cast<int64_t>(units * unit));
    done += length;
  }
  if ((bit + 7) / 8 != job.end) file.damaged("a stream ends elsewhere than its index says");
}

struct EmitItems {
  const uint32_t* item_of_rank;
  int32_t* item;
  uint8_t* feedback;
  uint32_t all = 0;  // an item is below 2^30; only the padding sets the top bit

  void operator()(uint64_t at, uint64_t rank, uint8_t tag, uint64_t&) {
    const uint32_t found = item_of_rank[rank];
    all |= found;
    item[at] = static_cast<int32_t>(found);
    feedback[at] = tag;
  }
};

// kRowBytes 0: known at run time only.
template <size_t kRowBytes>
struct EmitRows {
  const uint32_t* item_of_rank;
  const uint8_t* table;
  size_t row_bytes;
  uint8_t* out;
  uint32_t all = 0;

  void operator()(uint64_t at, uint64_t rank, uint8_t, uint64_t&) {
    const uint32_t found = item_of_rank[rank];
    all |= found;
    const size_t bytes = kRowBytes > 0 ? kRowBytes : row_bytes;
    const size_t row = found & ~ShardFile::kNoItem;  // the padding reads row 0 and is told by `all`
    std::memcpy(out + at * bytes, table + row * bytes, bytes);
  }
};

struct EmitTimes {
  int64_t* time;
  uint64_t unit;

  void operator()(uint64_t at, uint64_t delta, uint8_t, uint64_t& units) {
    units += delta;
    time[at] = static_cast<int64_t>(units * unit);
  }
};

}  // namespace

NEGFAST_DISPATCH void decode_items(const ShardFile& file, std::span<const DecodeJob> jobs, int32_t* item, uint8_t* feedback) {
  EmitItems emit{file.item_of_rank(), item, feedback};
  decode_streams(file, file.item_table(), jobs, 0, emit);
  if (emit.all >> 31) file.damaged("a rank without an item");
}

template <size_t kRowBytes>
static inline void decode_rows_of(const ShardFile& file, std::span<const DecodeJob> jobs, const uint8_t* table,
                                  size_t row_bytes, uint8_t* out) {
  EmitRows<kRowBytes> emit{file.item_of_rank(), table, row_bytes, out};
  decode_streams(file, file.item_table(), jobs, 0, emit);
  if (emit.all >> 31) file.damaged("a rank without an item");
}

NEGFAST_DISPATCH void decode_rows(const ShardFile& file, std::span<const DecodeJob> jobs, const uint8_t* table,
                                  size_t row_bytes, uint8_t* out) {
  switch (row_bytes) {  // three or four codes of two or four bytes: one or two moves
    case 6: return decode_rows_of<6>(file, jobs, table, row_bytes, out);
    case 8: return decode_rows_of<8>(file, jobs, table, row_bytes, out);
    case 12: return decode_rows_of<12>(file, jobs, table, row_bytes, out);
    case 16: return decode_rows_of<16>(file, jobs, table, row_bytes, out);
    default: return decode_rows_of<0>(file, jobs, table, row_bytes, out);
  }
}

NEGFAST_DISPATCH void decode_times(const ShardFile& file, std::span<const DecodeJob> jobs, int64_t* time) {
  if (file.header().features & kTimeRuns) {
    for (const DecodeJob& job : jobs)
      if (job.events > 0) decode_time_runs(file, job, time);
    return;
  }
  EmitTimes emit{time, file.header().time_unit};
  decode_streams(file, file.delta_table(), jobs, static_cast<uint64_t>(file.header().time_base), emit);
}

}  // namespace negfast
