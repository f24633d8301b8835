// Random batches with every instruction set and several numbers of threads, for the sanitizers. Each operand has memory of its
// own, of exactly its size, at any alignment. All must give the same bits and counts.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>

#include "../../../csrc/merge_cpu.h"

using namespace negmerge;

namespace {

std::mt19937_64 random_bits(1);

std::int64_t random_below(std::int64_t bound) {
  return static_cast<std::int64_t>(random_bits() % static_cast<std::uint64_t>(bound));
}

// Bytes at any address; those behind them belong to nobody.
struct Memory {
  std::unique_ptr<char[]> held;
  char* at;
  std::int64_t size;

  explicit Memory(std::int64_t bytes) : size(bytes) {
    const std::int64_t offset = random_below(64);
    held.reset(new char[offset + bytes]);
    at = held.get() + offset;
  }
  void fill(Dtype dtype) {
    for (std::int64_t i = 0; i < size; i += 8) {
      const std::uint64_t bits = random_bits();
      std::memcpy(at + i, &bits, std::min<std::int64_t>(8, size - i));
    }
    // Most numbers of ordinary size.
    if (dtype == kF32 || dtype == kF64)
      for (std::int64_t i = kSizes[dtype] - 1; i < size; i += kSizes[dtype])
        if (i % 7) at[i] = static_cast<char>((at[i] & 0x80) | 0x3f);
  }
};

bool same_results(int round) {
  const Dtype types[] = {kF64, kF32, kF16, kBF16};
  const std::int64_t n = 1 + random_below(round % 10 ? 9 : 40), segments = random_below(30);
  Batch batch{};
  batch.result = types[random_below(4)];
  std::vector<Dtype> dtypes;
  for (std::int64_t k = 0; k < n; ++k) dtypes.push_back(round % 2 ? batch.result : types[random_below(4)]);
  batch.dtypes = dtypes.data();
  batch.n = n;
  batch.task_vectors = random_below(2);
  batch.scale = 0.9;
  batch.required = random_below(2) ? n : n / 2 + 1;
  batch.segments = segments;

  std::vector<Memory> inputs, out;
  std::vector<std::int64_t> descriptors;
  for (std::int64_t s = 0; s < segments; ++s) {
    const std::int64_t numel = random_below(4) ? random_below(200) : random_below(20'000);
    descriptors.push_back(numel);
    const auto add = [&](std::vector<Memory>& to, Dtype dtype) {
      to.emplace_back(numel * kSizes[dtype]);
      to.back().fill(dtype);
      descriptors.push_back(reinterpret_cast<std::int64_t>(to.back().at));
    };
    add(inputs, batch.result);
    add(out, batch.result);
    for (const Dtype dtype : dtypes) add(inputs, dtype);
  }
  batch.descriptors = descriptors.data();

  std::vector<std::vector<char>> results;
  std::vector<std::int64_t> expected;
  for (const std::string& instruction_set : instruction_sets())
    for (const int threads : {1, 4}) {
      std::vector<std::int64_t> counts(kCounted * segments);
      batch.counts = counts.data();
      for (Memory& memory : out) std::memset(memory.at, 0xa5, memory.size);
      merge_cpu(batch, threads, instruction_set);
      std::vector<char> written;
      for (const Memory& memory : out) written.insert(written.end(), memory.at, memory.at + memory.size);
      results.push_back(std::move(written));
      if (expected.empty()) expected = counts;
      if (counts != expected || results.back() != results.front()) {
        std::printf("round %d: %s on %d threads differs\n", round, instruction_set.c_str(), threads);
        return false;
      }
    }
  return true;
}

constexpr int kRounds = 80;

}  // namespace

int main() {
  for (int round = 0; round < kRounds; ++round)
    if (!same_results(round)) return 1;
  std::printf("%d batches: the same bits\n", kRounds);
}
