// Times csrc/merge_loop.cpp, compiled with some constants, and reading memory, on two threads. loop.py builds and runs it.
// Arguments: models, storage type (1 F32, 2 F16, 3 BF16), elements, bytes from one stream's page offset to the next's, rounds.
// Prints a line for each round: seconds to read all inputs, to merge out of place, and to merge in place.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../../csrc/merge_loop.h"

namespace negmerge {
void merge_loop(const Batch&, Position, std::int64_t, bool);
}
using namespace negmerge;

constexpr std::int64_t kAtOnce = 65536;

template <class Task>
double seconds(std::int64_t elements, Task task) {
  const auto began = std::chrono::steady_clock::now();
  std::atomic<std::int64_t> next{0};
  const auto run = [&] {
    for (std::int64_t at; (at = next.fetch_add(kAtOnce)) < elements;) task(at, std::min(kAtOnce, elements - at));
  };
  std::thread other(run);
  run();
  other.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

std::uint64_t read(const char* from, std::int64_t bytes) {
  std::uint64_t sums[8] = {};
  for (std::int64_t i = 0; i + 64 <= bytes; i += 64)
    for (int word = 0; word < 8; ++word) sums[word] ^= reinterpret_cast<const std::uint64_t*>(from + i)[word];
  return sums[0] ^ sums[1] ^ sums[2] ^ sums[3] ^ sums[4] ^ sums[5] ^ sums[6] ^ sums[7];
}

int main(int, char** argument) {
  const std::int64_t n = std::atoll(argument[1]), elements = std::atoll(argument[3]), skew = std::atoll(argument[4]);
  const auto dtype = static_cast<Dtype>(std::atoi(argument[2]));
  const std::int64_t size = kSizes[dtype];
  std::vector<char*> operands;
  unsigned random = 1;
  for (std::int64_t k = 0; k < n + 2; ++k) {
    char* memory = static_cast<char*>(std::aligned_alloc(4096, (elements * size + 8191 + 4096) / 4096 * 4096));
    operands.push_back(memory + k * skew % 4096);
    for (std::int64_t i = 0; i < elements; ++i) {
      random = random * 1664525u + 1013904223u;
      if (size == 4) reinterpret_cast<float*>(operands[k])[i] = static_cast<float>(static_cast<int>(random));
      else reinterpret_cast<std::uint16_t*>(operands[k])[i] = static_cast<std::uint16_t>((random >> 16 & 0x83ff) | 0x3c00);
    }
  }
  std::vector<std::int64_t> row{elements};
  for (const char* operand : operands) row.push_back(reinterpret_cast<std::int64_t>(operand));
  std::vector<std::int64_t> in_place = row;
  in_place[2] = in_place[1];
  const std::vector<Dtype> dtypes(n, dtype);
  std::int64_t counts[kCounted] = {};
  Batch batch{dtype, dtypes.data(), n, false, 0.9, n, 1, row.data(), counts};
  std::atomic<std::uint64_t> seen{0};
  for (int round = std::atoi(argument[5]); round > 0; --round) {
    const double reading = seconds(elements, [&](std::int64_t at, std::int64_t count) {
      for (std::size_t k = 0; k < operands.size(); ++k)
        if (k != 1) seen ^= read(operands[k] + at * size, count * size);
    });
    double merging[2];
    for (const bool apart : {true, false}) {
      batch.descriptors = (apart ? row : in_place).data();
      merging[!apart] = seconds(elements, [&](std::int64_t at, std::int64_t count) { merge_loop(batch, {0, at}, count, false); });
    }
    std::printf("%.9f %.9f %.9f\n", reading, merging[0], merging[1]);
  }
}
