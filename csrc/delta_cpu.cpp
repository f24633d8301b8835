// Consensus deltas on the CPU: the choice of an instruction set, and the threads that apply a batch.
#include <algorithm>
#include <stdexcept>

#include "delta.h"
#include "merge_cpu.h"
#include "threads.h"

namespace negmerge {

extern const DeltaLoop delta_loop_baseline;
#ifdef __x86_64__
extern const DeltaLoop delta_loop_avx2, delta_loop_avx512;
#endif

namespace {

std::int64_t blocks_of(std::int64_t numel) { return (numel + kRankBlock - 1) / kRankBlock; }

// Bytes that are read and written for an element, if half of the mask is set.
std::int64_t bytes_per_element(const DeltaBatch& batch) { return 2 * kSizes[batch.result] + kSizes[batch.means] / 2; }

}  // namespace

const DeltaLoop& delta_loop(const std::string& instruction_set) {
  const std::vector<std::string> found = instruction_sets();
  if (std::find(found.begin(), found.end(), instruction_set) == found.end())
    throw std::invalid_argument("no instruction set " + instruction_set + " here");
#ifdef __x86_64__
  if (instruction_set == "avx512") return delta_loop_avx512;
  if (instruction_set == "avx2") return delta_loop_avx2;
#endif
  return delta_loop_baseline;
}

void apply_cpu(const DeltaBatch& batch, int threads, const std::string& instruction_set) {
  const DeltaLoop& loop = delta_loop(instruction_set);
  threads = std::clamp(threads, 1, kMaxThreads);
  // In whole blocks, so that every chunk begins with one.
  Partition partition(batch.segments, threads, [&](std::int64_t i) { return blocks_of(segment_of(batch, i).numel) * kRankBlock; });
  const std::int64_t bytes = partition.elements() * bytes_per_element(batch);
  run_on_threads(threads, bytes, [&] {
    partition.run([&](std::int64_t segment, std::int64_t start, std::int64_t elements) {
      for (std::int64_t blocks = elements / kRankBlock; blocks; ++segment, start = 0) {
        const std::int64_t first = start / kRankBlock;
        const std::int64_t count = std::min(blocks, blocks_of(segment_of(batch, segment).numel) - first);
        if (count) loop.apply(batch, segment, first, count, bytes <= kInCache);
        blocks -= count;
      }
    });
  });
}

std::int64_t rank_blocks(const DeltaLoop& loop, const char* mask, std::int64_t numel, std::int64_t* ranks) {
  std::int64_t total = 0;
  for (std::int64_t start = 0; start < numel; start += kRankBlock) {
    ranks[start / kRankBlock] = total;
    total += loop.rank(mask, start, std::min(start + kRankBlock, numel));
  }
  return total;
}

}  // namespace negmerge
