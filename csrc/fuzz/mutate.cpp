// A driver for compilers without libFuzzer: mutates seed shards at random for a number of seconds.
//   fuzz_shard SECONDS SEED_FILE...
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Bytes = std::vector<uint8_t>;

// One to sixteen changes: half of them near the front, where header and tables lie.
void mutate(Bytes& file, std::mt19937_64& random) {
  const uint64_t interesting[] = {0, 1, 0x7f, 0x80, 0xff, 0xffff, 0x10000, ~0ull, 1ull << 31, 1ull << 32, 1ull << 63};
  for (uint64_t changes = 1 + random() % 16; changes > 0 && !file.empty(); --changes) {
    const size_t range = random() % 2 ? std::min<size_t>(file.size(), 256) : file.size();
    const size_t at = random() % range;
    switch (random() % 6) {
      case 0: file[at] ^= static_cast<uint8_t>(1u << random() % 8); break;
      case 1: file[at] = static_cast<uint8_t>(random()); break;
      case 2: {
        const uint64_t value = interesting[random() % std::size(interesting)];
        for (size_t k = 0; k < 8 && at + k < file.size(); ++k) file[at + k] = static_cast<uint8_t>(value >> 8 * k);
        break;
      }
      case 3: file[at] = static_cast<uint8_t>(file[at] + (random() % 2 ? 1 : -1)); break;
      case 4: file.insert(file.begin() + static_cast<std::ptrdiff_t>(at), static_cast<uint8_t>(random())); break;
      case 5:
        if (random() % 4 == 0) file.resize(at);
        break;
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) {
    std::fprintf(stderr, "usage: %s SECONDS SEED_FILE...\n", arguments[0]);
    return 2;
  }
  std::vector<Bytes> seeds;
  for (int i = 2; i < count; ++i) {
    std::ifstream in(arguments[i], std::ios::binary);
    seeds.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
  }
  const uint64_t seed = std::random_device{}();
  std::mt19937_64 random(seed);
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(arguments[1]));
  uint64_t runs = 0;
  for (; std::chrono::steady_clock::now() < end; ++runs) {
    Bytes file = seeds[random() % seeds.size()];
    if (runs >= seeds.size()) mutate(file, random);
    LLVMFuzzerTestOneInput(file.data(), file.size());
  }
  std::printf("%llu runs, nothing found\n", static_cast<unsigned long long>(runs));
}
