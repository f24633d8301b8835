// Launches the CUDA kernel of merge_tiles.h: one launch for a batch.
#include "merge_cuda.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "arithmetic.h"
#include "cuda_launch.h"
#include "merge_tiles.h"

namespace negmerge {
namespace {

#ifndef NEGMERGE_CUDA_WAVES
#define NEGMERGE_CUDA_WAVES 16
#endif
constexpr int kWaves = NEGMERGE_CUDA_WAVES;  // blocks for each one that runs at a time

// A batch's table, and where a launch runs.
struct Launch {
  const std::int64_t* table;
  std::int64_t words, tiles, max_blocks;
  int device;
  cudaStream_t stream;

  bool one_type(const Batch& batch) const {
    return std::all_of(batch.dtypes, batch.dtypes + batch.n, [&](Dtype dtype) { return dtype == batch.dtypes[0]; });
  }
};

template <class T>
KernelArgs<T> kernel_args(const Batch& batch, const Launch& launch) {
  const auto n = static_cast<T>(batch.n);
  KernelArgs<T> args;
  args.memory = launch.words ? nullptr : launch.table;
  args.counts = batch.counts;
  args.models = static_cast<int>(batch.n);
  args.first = (args.models - 1) % kGroup + 1;
  args.segments = static_cast<int>(batch.segments);
  args.tiles = static_cast<int>(launch.tiles);
  args.one_type = launch.one_type(batch);
  args.type = batch.dtypes[0];
  args.constants = {static_cast<T>(batch.scale), n, static_cast<T>(batch.required), static_cast<T>(batch.n - batch.required)};
  args.reciprocal = batch.n <= kMaxModels ? T(1) / n : std::numeric_limits<T>::quiet_NaN();
  args.subtracted = batch.task_vectors ? T(0) : T(1);
  std::copy_n(launch.table, launch.words, args.table);
  return args;
}

template <class T, class S, bool kSameDtype, template <class, class> class Accumulator>
void run(const Batch& batch, const Launch& launch) {
  KernelArgs<T> args = kernel_args<T>(batch, launch);
  void (*const kernel)(KernelArgs<T>) = merge_tiles<T, S, kSameDtype, Accumulator>;
  const auto blocks = static_cast<unsigned>(
      std::min({launch.tiles, launch.max_blocks, blocks_at_a_time(kernel, kThreads, launch.device) * kWaves}));
  void* arguments[] = {&args};
  check(cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), arguments, 0, launch.stream), "launch");
}

template <class T, class S, bool kSameDtype>
void run(const Batch& batch, const Launch& launch) {
  if (batch.required == batch.n) run<T, S, kSameDtype, Unanimous>(batch, launch);
  else run<T, S, kSameDtype, Majority>(batch, launch);
}

template <class T, class S>
void run(const Batch& batch, const Launch& launch) {
  if constexpr (sizeof(T) == sizeof(typename S::Float)) {
    if (batch.dtypes[0] == batch.result && launch.one_type(batch)) return run<T, S, true>(batch, launch);
  }
  run<T, S, false>(batch, launch);
}

template <class T>
void run(const Batch& batch, const Launch& launch) {
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

void merge_cuda(const Batch& batch, const std::int64_t* table, std::int64_t words, std::int64_t tiles, std::int64_t max_blocks,
                int device, std::uint64_t stream) {
  if (!tiles) return;
  constexpr std::int64_t kMax = std::numeric_limits<int>::max();
  if (words > kCudaTable) throw std::invalid_argument("the table does not go along with a launch");
  if (std::max({tiles, batch.n, batch.segments}) >= kMax) throw std::invalid_argument("a batch for several launches");
  const OnDevice current(device);
  const PlainArithmetic plain;  // λ is rounded here
  if (!words) require_on_device(table, device, "the table");
  require_on_device(batch.counts, device, "the memory for the counts");
  const Launch launch{table, words, tiles, max_blocks, device, reinterpret_cast<cudaStream_t>(stream)};
  is_double(batch) ? run<double>(batch, launch) : run<float>(batch, launch);
}

}  // namespace negmerge
