// The CPU kernels of low-rank differences beside their floor, on one thread. low_rank.py builds and runs it.
// Arguments: models, rank, rows, columns, elements of a chunk, 1 if right factors are in panels, storage type of the base (1 F32, 2 F16,
// 3 BF16), 1 for merged models, instruction set, rounds.
// Prints whether the bits are those of merging dense differences, then a line for each round: seconds of
// - as many multiplications and additions in registers, and nothing else;
// - expanding one model, a tile again and again;
// - merging all, tile by tile, chunk after chunk;
// - merging them dense, from memory;
// - merging so many tiles dense, from the cache;
// - reading and writing the base.
// Seconds are of this thread's CPU time, which other processes take least from.
#include <ctime>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/low_rank.h"
#include "../../csrc/merge_cpu.h"
#include "../../csrc/packs.h"

using namespace negmerge;

namespace {

double now() {
  timespec found;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &found);
  return found.tv_sec + 1e-9 * found.tv_nsec;
}

template <class Task>
double seconds_of(const Task& task) {
  const double began = now();
  task();
  return now() - began;
}

// As many products and sums as `elements` elements have, for a rank; and one more product of each.
__attribute__((noinline)) float floor_loop(std::int64_t elements, std::int64_t rank) {
  using N = Vector<float, kPackBytes / 4>::type;
  constexpr int kSums = 8;
  N sum[kSums] = {}, left = N{} + 1.5f, right = N{} + 0.25f;
  for (std::int64_t block = elements / (kSums * kPackBytes / 4); block--;) {
    for (std::int64_t r = 0; r < rank; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kSums; ++j) {
        N product = left * right;
        asm volatile("" : "+x"(product));  // computed each time
        sum[j] = sum[j] + product;
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kSums; ++j) sum[j] = sum[j] * left;
  }
  float total = 0;
  for (const N& each : sum) total += each[0];
  return total;
}

std::vector<float> random_numbers(std::int64_t count, std::mt19937& generator) {
  std::normal_distribution<float> normal(0, 0.05f);
  std::vector<float> numbers(count);
  for (float& number : numbers) number = normal(generator);
  return numbers;
}

}  // namespace

int main(int, char** argv) {
  const std::int64_t n = std::atoll(argv[1]), rank = std::atoll(argv[2]), rows = std::atoll(argv[3]), columns = std::atoll(argv[4]);
  const std::int64_t chunk = std::atoll(argv[5]);
  const bool in_panels = std::atoi(argv[6]), merged = std::atoi(argv[8]);
  const auto type = static_cast<Dtype>(std::atoi(argv[7]));
  const std::string instruction_set = argv[9];
  const int rounds = std::atoi(argv[10]);
  const std::int64_t numel = rows * columns, size = kSizes[type], model_size = merged ? size : 4;
  std::mt19937 generator(0);

  std::vector<char> base(numel * size), out(numel * size), out_dense(numel * size);
  const auto numbers = random_numbers(numel, generator);
  for (std::int64_t i = 0; i < numel; ++i) {
    const float x = numbers[i];
    const auto bits = bits_as<std::uint32_t>(x);
    const std::uint16_t half = type == kF16 ? F16::round<std::uint32_t>(x) : bits >> 16;
    memcpy(base.data() + i * size, size == 4 ? static_cast<const void*>(&bits) : &half, size);
  }
  std::vector<std::vector<float>> factors;
  std::vector<std::vector<char>> panels;
  std::vector<std::int64_t> expansions(n), descriptors{numel, reinterpret_cast<std::int64_t>(base.data()),
                                                       reinterpret_cast<std::int64_t>(out.data())};
  for (std::int64_t k = 0; k < n; ++k) {
    // All of them lean to one side, so that many elements agree.
    for (const std::int64_t count : {rows * rank, rank * columns}) {
      factors.push_back(random_numbers(count, generator));
      if (k)
        for (std::int64_t i = 0; i < count; ++i) factors.back()[i] = 0.2f * factors.back()[i] + factors[count == rows * rank ? 0 : 1][i];
    }
    Expansion e{reinterpret_cast<const char*>(factors[2 * k].data()), reinterpret_cast<const char*>(factors[2 * k + 1].data()),
                1, rows, columns, rank, 2, nullptr, 0};
    if (in_panels) {
      panels.emplace_back((columns + 63) / 64 * rank * kPanel + 64);
      char* at = reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(panels.back().data()) + 63) / 64 * 64);
      pack_panels(e, 4, 0, 0, columns, at);
      e.panels = at;
    }
    expansions[k] = expansions.size();
    expansions.resize(expansions.size() + sizeof e / 8);
    memcpy(&expansions[expansions[k]], &e, sizeof e);
    descriptors.push_back(0);
  }
  std::vector<std::int64_t> counts(kCounted), counts_dense(kCounted);
  const std::vector<Dtype> dtypes(n, merged ? type : kF32);
  Batch batch{};
  batch.result = type;
  batch.dtypes = dtypes.data();
  batch.n = n;
  batch.task_vectors = !merged;
  batch.scale = 0.9;
  batch.required = n;
  batch.segments = 1;
  batch.descriptors = descriptors.data();
  batch.counts = counts.data();
  batch.expansions = expansions.data();

  // The same differences, dense.
  std::vector<char> dense(n * numel * model_size);
  auto dense_descriptors = descriptors;
  dense_descriptors[2] = reinterpret_cast<std::int64_t>(out_dense.data());
  for (std::int64_t k = 0; k < n; ++k) {
    dense_descriptors[3 + k] = reinterpret_cast<std::int64_t>(dense.data() + k * numel * model_size);
    std::vector<std::int64_t> row{numel, merged ? descriptors[1] : 0, dense_descriptors[3 + k]};
    row.insert(row.end(), &expansions[expansions[k]], &expansions[expansions[k]] + sizeof(Expansion) / 8);
    expand_cpu({false, merged, type, 1, row.data()}, 1, instruction_set);
  }
  Batch dense_batch = batch;
  dense_batch.expansions = nullptr;
  dense_batch.descriptors = dense_descriptors.data();
  dense_batch.counts = counts_dense.data();

  // A tile that fits the second-level cache, expanded, and merged.
  const std::int64_t tile_rows = std::min<std::int64_t>(rows, 64), tile_columns = std::min<std::int64_t>(columns, 64);
  const std::int64_t tile = tile_rows * tile_columns, tiles = std::max<std::int64_t>(1, numel / tile);
  std::vector<char> tile_out(tile * 4);
  std::vector<std::int64_t> tile_row{tile, merged ? descriptors[1] : 0, reinterpret_cast<std::int64_t>(tile_out.data())};
  tile_row.insert(tile_row.end(), &expansions[expansions[0]], &expansions[expansions[0]] + sizeof(Expansion) / 8);
  auto* of_tile = reinterpret_cast<Expansion*>(&tile_row[3]);
  of_tile->rows = tile_rows;
  of_tile->columns = tile_columns;
  std::vector<std::vector<std::int64_t>> chunk_rows, chunk_expansions;
  for (std::int64_t begin = 0; begin < numel; begin += chunk) {
    chunk_rows.push_back(descriptors);
    chunk_rows.back()[0] = std::min(numel - begin, chunk);
    for (int i : {1, 2}) chunk_rows.back()[i] += begin * size;
    chunk_expansions.push_back(expansions);
    for (std::int64_t k = 0; k < n; ++k) reinterpret_cast<Expansion*>(&chunk_expansions.back()[expansions[k]])->begin = begin;
  }
  const std::int64_t part = std::min<std::int64_t>(numel, (1 << 18) / (n * model_size));
  auto part_descriptors = dense_descriptors;
  part_descriptors[0] = part;
  Batch part_batch = dense_batch;
  part_batch.descriptors = part_descriptors.data();

  volatile float sink = 0;
  bool same = true;
  for (int round = 0; round < rounds; ++round) {
    const double floor = seconds_of([&] { sink = sink + floor_loop(n * numel, rank); });
    const double expanded = seconds_of([&] {
      for (std::int64_t i = 0; i < tiles; ++i) expand_cpu({false, merged, type, 1, tile_row.data()}, 1, instruction_set);
    });
    const double in_tiles = seconds_of([&] {
      for (std::size_t i = 0; i < chunk_rows.size(); ++i) {
        Batch each = batch;
        each.descriptors = chunk_rows[i].data();
        each.expansions = chunk_expansions[i].data();
        merge_cpu(each, 1, instruction_set);
      }
    });
    const double in_memory = seconds_of([&] { merge_cpu(dense_batch, 1, instruction_set); });
    same = same && counts == counts_dense && out == out_dense;
    const double in_cache = seconds_of([&] {
      for (std::int64_t done = 0; done < numel; done += part) merge_cpu(part_batch, 1, instruction_set);
    });
    std::fill(counts_dense.begin(), counts_dense.end(), 0);
    std::fill(counts.begin(), counts.end(), 0);
    const double copied = seconds_of([&] { memcpy(out.data(), base.data(), base.size()); });
    if (round == 0) std::printf("%s\n", same ? "same" : "other bits or counts");
    std::printf("%g %g %g %g %g %g\n", floor, expanded * numel / (tiles * tile), in_tiles, in_memory, in_cache, copied);
  }
  return same ? 0 : 1;
}
