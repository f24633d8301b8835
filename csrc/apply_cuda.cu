// Launches the CUDA kernel of apply_tiles.h: one launch for a batch.
#include "apply_cuda.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "apply_tiles.h"
#include "arithmetic.h"
#include "cuda_launch.h"

namespace negmerge {
namespace {

constexpr int kApplyWaves = 16;  // blocks for each one that runs at a time: as of merge_cuda.cu

struct ApplyLaunch {
  const std::int64_t* table;
  std::int64_t words, tiles, max_blocks;
  int device;
  cudaStream_t stream;
};

template <class T, class S, class M>
void apply(const DeltaBatch& batch, const ApplyLaunch& launch) {
  ApplyArgs<T> args;
  args.memory = launch.words ? nullptr : launch.table;
  args.counts = batch.counts;
  args.segments = static_cast<int>(batch.segments);
  args.tiles = static_cast<int>(launch.tiles);
  args.act = batch.act;
  args.constants = {static_cast<T>(batch.scale), T(1), T(1), T(0)};
  std::copy_n(launch.table, launch.words, args.table);
  void (*const kernel)(ApplyArgs<T>) = apply_tiles<T, S, M>;
  const std::int64_t full = (launch.tiles + kApplyWarps - 1) / kApplyWarps;  // blocks with a tile for each warp, but for the last
  const auto blocks = static_cast<unsigned>(
      std::min({full, launch.max_blocks, blocks_at_a_time(kernel, kApplyThreads, launch.device) * kApplyWaves}));
  void* arguments[] = {&args};
  check(cudaLaunchKernel(kernel, dim3(blocks), dim3(kApplyThreads), arguments, 0, launch.stream), "launch");
}

template <class T, class S>
void apply(const DeltaBatch& batch, const ApplyLaunch& launch) {
  switch (batch.means) {
    case kF64:
      if constexpr (sizeof(T) == 8) return apply<T, S, F64>(batch, launch);
      break;
    case kF32:
      if constexpr (sizeof(T) == 4) return apply<T, S, F32>(batch, launch);
      break;
    case kBF16: return apply<T, S, BF16>(batch, launch);
    default: break;
  }
  throw std::invalid_argument("means that are neither of the arithmetic type nor BF16");
}

template <class T>
void apply(const DeltaBatch& batch, const ApplyLaunch& launch) {
  switch (batch.result) {
    case kF64:
      if constexpr (sizeof(T) == 8) return apply<T, F64>(batch, launch);
      throw std::invalid_argument("a base of F64 with arithmetic of F32");
    case kF32: return apply<T, F32>(batch, launch);
    case kF16: return apply<T, F16>(batch, launch);
    case kBF16: return apply<T, BF16>(batch, launch);
  }
}

}  // namespace

void apply_cuda(const DeltaBatch& batch, const std::int64_t* table, std::int64_t words, std::int64_t tiles,
                std::int64_t max_blocks, int device, std::uint64_t stream) {
  if (!tiles) return;
  constexpr std::int64_t kMax = std::numeric_limits<int>::max();
  if (words > kCudaTable) throw std::invalid_argument("the table does not go along with a launch");
  if (std::max(tiles, batch.segments) >= kMax - kApplyWarps) throw std::invalid_argument("a batch for several launches");
  const OnDevice current(device);
  const PlainArithmetic plain;  // λ is rounded here
  if (!words) require_on_device(table, device, "the table");
  require_on_device(batch.counts, device, "the memory for the counts");
  const ApplyLaunch launch{table, words, tiles, max_blocks, device, reinterpret_cast<cudaStream_t>(stream)};
  batch.is_double ? apply<double>(batch, launch) : apply<float>(batch, launch);
}

}  // namespace negmerge
