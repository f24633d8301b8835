// Launches the CUDA kernel of family_tiles.h: one launch for a batch.
#include "family_cuda.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "arithmetic.h"
#include "cuda_launch.h"
#include "family_tiles.h"

namespace negmerge {
namespace {

constexpr int kFamilyWaves = 16;  // blocks for each one that runs at a time: as of merge_cuda.cu

// A batch's table, and where a launch runs.
struct FamilyLaunch {
  const std::int64_t* table;
  std::int64_t words, tiles, max_blocks;
  int device;
  cudaStream_t stream;
};

template <class T, class S, int kTotalled>
void run(const Batch& batch, const FamilyLaunch& launch) {
  FamilyArgs<T> args;
  args.memory = launch.words ? nullptr : launch.table;
  args.counts = batch.counts;
  args.models = static_cast<int>(batch.n);
  args.segments = static_cast<int>(batch.segments);
  args.tiles = static_cast<int>(launch.tiles);
  args.gate = batch.family->gate;
  args.election = batch.family->election;
  args.reduction = batch.family->reduction;
  args.seed = batch.family->seed;
  args.constants = family_constants<T>(batch);
  args.subtracted = batch.task_vectors ? T(0) : T(1);
  std::copy_n(launch.table, launch.words, args.table);
  void (*const kernel)(FamilyArgs<T>) = family_tiles<T, S, kTotalled>;
  const auto blocks = static_cast<unsigned>(
      std::min({launch.tiles, launch.max_blocks, blocks_at_a_time(kernel, kFamilyThreads, launch.device) * kFamilyWaves}));
  void* arguments[] = {&args};
  check(cudaLaunchKernel(kernel, dim3(blocks), dim3(kFamilyThreads), arguments, 0, launch.stream), "launch");
}

// Means and sums, TIES and DARE, MagMax and weighted NegMerge have kernels of their own; each takes time to compile.
template <class T, class S>
void run(const Batch& batch, const FamilyLaunch& launch) {
  if constexpr (sizeof(T) == 4) {
    switch (totals_of(batch.family->election, batch.family->reduction, batch.required == batch.n)) {
      case kTotalSum:
        if (batch.family->election == kAll) return run<T, S, kTotalSum>(batch, launch);
        break;
      case kTotalLargest:
        if (batch.family->election == kAll) return run<T, S, kTotalLargest>(batch, launch);
        break;
      case kTotalSigns: return run<T, S, kTotalSigns>(batch, launch);
      case kTotalExtremes:
        if (batch.family->election == kAgreement) return run<T, S, kTotalExtremes>(batch, launch);
        break;
    }
  }
  run<T, S, kTotalAll>(batch, launch);
}

template <class T>
void run(const Batch& batch, const FamilyLaunch& launch) {
  switch (batch.result) {
    case kF64:
      if constexpr (sizeof(T) == 8) run<T, F64>(batch, launch);
      break;
    case kF32: run<T, F32>(batch, launch); break;
    case kF16: run<T, F16>(batch, launch); break;
    case kBF16: run<T, BF16>(batch, launch); break;
  }
}

}  // namespace

void family_cuda(const Batch& batch, const std::int64_t* table, std::int64_t words, std::int64_t tiles, std::int64_t max_blocks,
                 int device, std::uint64_t stream) {
  if (!tiles) return;
  constexpr std::int64_t kMax = std::numeric_limits<int>::max();
  if (words > kCudaTable) throw std::invalid_argument("the table does not go along with a launch");
  if (std::max({tiles, batch.n, batch.segments}) >= kMax) throw std::invalid_argument("a batch for several launches");
  const OnDevice current(device);
  const PlainArithmetic plain;  // numbers are rounded here
  if (!words) require_on_device(table, device, "the table");
  require_on_device(batch.counts, device, "the memory for the counts");
  const FamilyLaunch launch{table, words, tiles, max_blocks, device, reinterpret_cast<cudaStream_t>(stream)};
  is_double(batch) ? run<double>(batch, launch) : run<float>(batch, launch);
}

}  // namespace negmerge
