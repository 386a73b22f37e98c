#include "decode.hpp"

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

}  // namespace

void decode_items(const ShardFile& file, std::span<const DecodeJob> jobs, int32_t* item, uint8_t* feedback) {
  const uint32_t* item_of_rank = file.item_of_rank();
  uint32_t all = 0;  // an item is below 2^30; only the padding sets the top bit
  decode_streams(file, file.item_table(), jobs, 0, [&](uint64_t at, uint64_t rank, uint8_t tag, uint64_t&) {
    const uint32_t found = item_of_rank[rank];
    all |= found;
    item[at] = static_cast<int32_t>(found);
    feedback[at] = tag;
  });
  if (all >> 31) file.damaged("a rank without an item");
}

void decode_times(const ShardFile& file, std::span<const DecodeJob> jobs, int64_t* time) {
  if (file.header().features & kTimeRuns) {
    for (const DecodeJob& job : jobs)
      if (job.events > 0) decode_time_runs(file, job, time);
    return;
  }
  const uint64_t unit = file.header().time_unit;
  decode_streams(file, file.delta_table(), jobs, static_cast<uint64_t>(file.header().time_base),
                 [&](uint64_t at, uint64_t delta, uint8_t, uint64_t& units) {
                   units += delta;
                   time[at] = static_cast<int64_t>(units * unit);
                 });
}

}  // namespace negfast
