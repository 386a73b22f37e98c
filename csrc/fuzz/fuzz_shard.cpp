// Feeds damaged shards to the reader: whatever the bytes, it must answer or throw ShardError.
//
// Checksums would turn nearly every mutation away at the door, so those that can be found are put right
// before the file is opened: what is fuzzed is the code behind them. Built with libFuzzer where there is
// clang; otherwise csrc/fuzz/mutate.cpp drives the same function.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "../crc32c.hpp"
#include "../packer.hpp"
#include "../shard.hpp"

namespace {

using namespace negfast;

bool inside(const Section& s, size_t size) { return s.offset <= size && s.size <= size - s.offset; }

// Makes checksums match again where the header still says where things are.
void repair(std::vector<uint8_t>& file) {
  Header header;
  if (file.size() < sizeof header) return;
  std::memcpy(&header, file.data(), sizeof header);
  header.file_size = file.size();
  if (inside(header.index, file.size())) {
    const uint64_t first = header.index.offset + -header.index.offset % 8;
    for (uint64_t at = first; at + sizeof(BlockIndex) <= header.index.offset + header.index.size;
         at += sizeof(BlockIndex)) {
      BlockIndex block;
      std::memcpy(&block, file.data() + at, sizeof block);
      auto repair_block = [&](uint64_t offset, uint64_t size, uint32_t& crc) {
        if (offset <= file.size() && size <= file.size() - offset) crc = crc32c(file.data() + offset, size);
      };
      repair_block(block.item_offset, block.item[kBlockUsers], block.item_crc);
      repair_block(block.time_offset, block.time[kBlockUsers], block.time_crc);
      std::memcpy(file.data() + at, &block, sizeof block);
    }
  }
  for (Section* s : {&header.codes, &header.ranks, &header.user_list, &header.index, &header.wide})
    if (inside(*s, file.size())) s->crc = crc32c(file.data() + s->offset, s->size);
  header.crc = crc32c(&header, offsetof(Header, crc));
  std::memcpy(file.data(), &header, sizeof header);
}

void read_everything(const std::string& path) {
  const Shard shard({path});
  if (shard.users() > 100'000 || shard.items() > 100'000) return;  // allowed, but only slow here
  std::vector<int32_t> users(shard.users());
  std::iota(users.begin(), users.end(), 0);
  std::vector<int64_t> offsets(users.size() + 1);
  shard.offsets(users, offsets.data());
  const auto events = static_cast<size_t>(offsets.back());
  std::vector<int32_t> item(events);
  std::vector<uint8_t> feedback(events);
  std::vector<int64_t> time(events);
  const std::vector<uint8_t> table(6 * shard.items() + 6);  // never null
  std::vector<uint8_t> rows(6 * events);
  for (int what = 0; what < 3; ++what) {  // one stream's damage must not hide the others'
    try {
      if (what == 0) shard.read_rows(users, offsets.data(), table.data(), 6, rows.data(), 1);
      if (what == 1) shard.read(users, offsets.data(), item.data(), feedback.data(), time.data(), 1);
      if (what == 2) {
        std::vector<int64_t> first(users.size(), 0), moments(users.size(), 0);
        for (size_t u = 0; u < users.size(); ++u)
          if (offsets[u] < offsets[u + 1]) moments[u] = time[static_cast<size_t>(offsets[u + 1]) - 1];
        std::vector<uint8_t> views(users.size(), 3);
        std::vector<int32_t> nodes(3 * shard.items());
        std::iota(nodes.begin(), nodes.end(), 0);
        const PackedParts parts = pack(shard, {users, first.data(), views.data()},
                                       {users, moments.data()}, {nodes.data(), shard.items(), 3}, 1);
        std::vector<int32_t> packed(parts.positions()), cu(users.size() + 1), prefix(users.size());
        std::vector<int32_t> seen(parts.seen()), seen_cu(users.size() + 1);
        std::vector<uint8_t> kind(parts.positions()), gap(parts.positions()), branch_gap(users.size());
        std::vector<std::vector<int32_t>> levels;  // node, request, count, slot of each
        PackedRoom room{packed, kind, gap, cu, prefix, branch_gap, seen, seen_cu, {}};
        levels.reserve(4 * parts.nodes().size());
        auto make = [&](uint64_t n) { return std::span<int32_t>(levels.emplace_back(n)); };
        for (uint64_t n : parts.nodes()) {
          const auto node = make(n), request = make(n), count = make(n), slot = make(parts.seen());
          room.seen.push_back({node, request, count, slot});
        }
        parts.write(room, 1);
      }
    } catch (const ShardError&) {
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::vector<uint8_t> file(data, data + size);
  repair(file);
  static const std::string path = [] {
    const char* folder = std::getenv("TMPDIR");
    return std::string(folder ? folder : "/tmp") + "/negfast-fuzz-" + std::to_string(::getpid()) + ".nfs";
  }();
  std::FILE* out = std::fopen(path.c_str(), "wb");
  if (out == nullptr || (!file.empty() && std::fwrite(file.data(), file.size(), 1, out) != 1)) std::abort();
  std::fclose(out);
  try {
    read_everything(path);
  } catch (const ShardError&) {
  }
  ::unlink(path.c_str());
  return 0;
}
