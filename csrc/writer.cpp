#include "writer.hpp"

#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "bits.hpp"
#include "crc32c.hpp"
#include "file.hpp"
#include "format.hpp"
#include "model.hpp"
#include "parallel.hpp"

namespace negfast {
namespace {

struct EncodedStripe {
  std::unique_ptr<uint8_t[]> items, times;  // never filled with zeros: most of the room is never touched
  size_t room = 0;
  std::vector<WideIndex> blocks;  // offsets of the rows within every block
  size_t item_bytes = 0, time_bytes = 0;
};

inline void put(BitWriter& writer, Encoded code) {
  writer.put(low_bits(code, kLengthShift), code >> kLengthShift);
}

// Two at once where they fit, which is nearly always: a put waits for the one before it.
inline void put(BitWriter& writer, Encoded a, Encoded b) {
  const unsigned length_a = a >> kLengthShift, length = length_a + (b >> kLengthShift);
  if (length <= kLengthShift) [[likely]]
    return writer.put(low_bits(a, kLengthShift) | low_bits(b, kLengthShift) << length_a, length);
  put(writer, a);
  put(writer, b);
}

// The codes that next() gives, n of them.
template <class Next>
inline void put_all(BitWriter& writer, int64_t n, Next&& next) {
  for (; n >= 2; n -= 2) {
    const Encoded a = next(), b = next();
    put(writer, a, b);
  }
  if (n > 0) put(writer, next());
}

uint8_t* encode_items(const ShardModel& model, uint64_t items, const Histories& h, uint64_t row, uint8_t* out) {
  BitWriter writer(out);
  const Encoded* codes = model.item_codes.data();
  const int32_t* item = h.item + h.offsets[row];
  const uint8_t* feedback = h.feedback + h.offsets[row];
  put_all(writer, h.offsets[row + 1] - h.offsets[row], [&] { return codes[*feedback++ * items + *item++]; });
  return writer.flush();
}

uint8_t* encode_times(const ShardModel& model, const Histories& h, uint64_t row, uint8_t* out) {
  BitWriter writer(out);
  const Encoder delta(model.delta), run(model.run);
  const uint32_t unit = model.time_unit;
  const int64_t *time = h.time + h.offsets[row], *end = h.time + h.offsets[row + 1];
  int64_t previous = model.time_base;
  auto next_delta = [&] {
    const int64_t now = to_units(*time++, unit), before = previous;
    previous = now;
    return delta.encode(static_cast<uint64_t>(now - before));
  };
  if (!model.time_runs) {
    put_all(writer, end - time, next_delta);
    return writer.flush();
  }
  while (time < end) {
    const int64_t* start = time;
    const Encoded a = next_delta();
    const int64_t next = (previous + 1) * static_cast<int64_t>(unit);  // first second of the next unit
    while (time < end && *time < next) ++time;
    put(writer, a, run.encode(static_cast<uint64_t>(time - start - 1)));
  }
  return writer.flush();
}

void encode_stripe(const ShardModel& model, uint64_t items, const Histories& h, EncodedStripe& out) {
  // No event takes more than 11 bytes of either stream: 42 bits a delta, 42 a run length.
  const size_t room = 11 * static_cast<size_t>(h.offsets.back() - h.offsets.front()) + 16;
  if (out.room < room) {
    out.items = std::make_unique_for_overwrite<uint8_t[]>(room);
    out.times = std::make_unique_for_overwrite<uint8_t[]>(room);
    out.room = room;
  }
  out.blocks.assign((h.rows() + kBlockUsers - 1) / kBlockUsers, WideIndex{});
  uint8_t *item = out.items.get(), *time = out.times.get();
  for (size_t b = 0; b < out.blocks.size(); ++b) {
    WideIndex& block = out.blocks[b];
    const uint8_t *item_start = item, *time_start = time;
    for (uint32_t k = 0; k < kBlockUsers; ++k) {
      const uint64_t row = b * kBlockUsers + k;
      uint64_t events = 0;
      if (row < h.rows()) {
        events = static_cast<uint64_t>(h.offsets[row + 1] - h.offsets[row]);
        item = encode_items(model, items, h, row, item);
        time = encode_times(model, h, row, time);
      }
      block.event[k + 1] = block.event[k] + events;
      block.item[k + 1] = static_cast<uint64_t>(item - item_start);
      block.time[k + 1] = static_cast<uint64_t>(time - time_start);
    }
  }
  out.item_bytes = static_cast<size_t>(item - out.items.get());
  out.time_bytes = static_cast<size_t>(time - out.times.get());
}

BlockIndex narrow(const WideIndex& block, std::vector<WideIndex>& wide) {
  BlockIndex index{};
  constexpr uint32_t last = kBlockUsers;
  if (block.event[last] >> 16 || block.item[last] >> 16 || block.time[last] >> 16) {
    const uint64_t position = wide.size();
    std::memcpy(index.event, &position, sizeof position);
    index.wide = 1;
    wide.push_back(block);
  } else {
    for (uint32_t k = 0; k <= last; ++k) {
      index.event[k] = static_cast<uint16_t>(block.event[k]);
      index.item[k] = static_cast<uint16_t>(block.item[k]);
      index.time[k] = static_cast<uint16_t>(block.time[k]);
    }
  }
  return index;
}

// Lets workers through in the order of their stripes.
class Turnstile {
 public:
  template <class Body>
  void pass(size_t ticket, Body&& body) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return next_ == ticket || broken_; });
    if (broken_) return;
    body();
    ++next_;
    changed_.notify_all();
  }
  void break_open() {
    std::lock_guard lock(mutex_);
    broken_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  size_t next_ = 0;
  bool broken_ = false;
};

// Records start at a multiple of 8 bytes and end at one; the zeros for that belong to the section.
Section append_section(AtomicFile& file, const void* data, size_t size) {
  std::vector<uint8_t> bytes(-file.size() % 8, 0);
  const auto* p = static_cast<const uint8_t*>(data);
  bytes.insert(bytes.end(), p, p + size);
  bytes.resize(bytes.size() + -size % 8, 0);
  const Section section{file.size(), bytes.size(), crc32c(bytes.data(), bytes.size()), 0};
  file.append(bytes.data(), bytes.size());
  return section;
}

std::vector<uint8_t> code_bytes(const ShardModel& model) {
  std::vector<uint8_t> bytes;
  for (const NumberCode* code : {&model.item, &model.delta, &model.run}) {
    const auto n = static_cast<uint16_t>(code->lengths.size());
    bytes.push_back(n & 255);
    bytes.push_back(n >> 8);
    bytes.insert(bytes.end(), code->lengths.begin(), code->lengths.end());
  }
  return bytes;
}

}  // namespace

void write_shard(const std::string& path, const EventSource& source, const WriteOptions& options) {
  const ShardModel model = build_model(source, options.items, options.time_unit, options.threads);
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.version = kVersion;
  header.features = (options.user_list.empty() ? 0u : kSparseUsers) | (model.time_runs ? kTimeRuns : 0u) |
                    (model.withdrawals ? kWithdrawals : 0u);
  header.rows = source.rows();
  header.users = options.users;
  header.events = model.events;
  header.items = options.items;
  header.ranked = model.item_of_rank.size();
  header.time_base = model.time_base;
  header.time_last = model.time_last;
  header.time_unit = model.time_unit;
  header.item_head_bits = static_cast<uint8_t>(model.item.head_bits);
  header.time_head_bits = static_cast<uint8_t>(model.delta.head_bits);
  header.run_head_bits = static_cast<uint8_t>(model.run.head_bits);

  AtomicFile file(path);
  file.append(&header, sizeof header);  // holds the place; written again when all is known
  const std::vector<uint8_t> codes = code_bytes(model);
  header.codes = append_section(file, codes.data(), codes.size());
  const std::vector<uint8_t> ranks = pack_bits(model.item_of_rank, bits_for(options.items));
  header.ranks = append_section(file, ranks.data(), ranks.size());
  header.user_list = append_section(file, options.user_list.data(), options.user_list.size_bytes());

  std::vector<BlockIndex> index;
  std::vector<WideIndex> wide;
  uint64_t events_before = 0;
  const size_t stripes = model.stripe_events.size();
  std::vector<SourceBuffer> buffers(std::max(1u, options.threads));
  std::vector<EncodedStripe> encoded(buffers.size());
  Turnstile turnstile;
  parallel_for(stripes, options.threads, [&](size_t s, unsigned worker) {
    try {
      const uint64_t first = s * kStripeUsers;
      const uint64_t rows = std::min<uint64_t>(kStripeUsers, source.rows() - first);
      EncodedStripe& stripe = encoded[worker];
      encode_stripe(model, options.items, source.read(first, rows, buffers[worker]), stripe);
      std::vector<BlockIndex> blocks;
      std::vector<uint32_t> crcs;
      const uint8_t *item = stripe.items.get(), *time = stripe.times.get();
      for (const WideIndex& block : stripe.blocks) {
        crcs.push_back(crc32c(item, block.item[kBlockUsers]));
        crcs.push_back(crc32c(time, block.time[kBlockUsers]));
        item += block.item[kBlockUsers];
        time += block.time[kBlockUsers];
      }
      turnstile.pass(s, [&] {
        uint64_t item_offset = file.size(), time_offset = file.size() + stripe.item_bytes;
        for (size_t b = 0; b < stripe.blocks.size(); ++b) {
          const WideIndex& block = stripe.blocks[b];
          BlockIndex entry = narrow(block, wide);
          entry.item_offset = item_offset;
          entry.time_offset = time_offset;
          entry.first_event = events_before;
          entry.item_crc = crcs[2 * b];
          entry.time_crc = crcs[2 * b + 1];
          item_offset += block.item[kBlockUsers];
          time_offset += block.time[kBlockUsers];
          events_before += block.event[kBlockUsers];
          index.push_back(entry);
        }
        file.append(stripe.items.get(), stripe.item_bytes);
        file.append(stripe.times.get(), stripe.time_bytes);
      });
    } catch (...) {
      turnstile.break_open();
      throw;
    }
  });

  header.index = append_section(file, index.data(), index.size() * sizeof(BlockIndex));
  header.wide = append_section(file, wide.data(), wide.size() * sizeof(WideIndex));
  header.file_size = file.size();
  header.crc = crc32c(&header, offsetof(Header, crc));
  file.write_at(&header, sizeof header, 0);
  file.commit();
}

}  // namespace negfast
