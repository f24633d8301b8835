// Launches the CUDA kernel of merge_tiles.h: one launch for a batch.
#include "merge_cuda.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <limits>

#include "arithmetic.h"
#include "cuda_launch.h"
#include "merge_tiles.h"

namespace negmerge {
namespace {

bool one_type(const Batch& batch) {
  return std::all_of(batch.dtypes, batch.dtypes + batch.n, [&](Dtype dtype) { return dtype == batch.dtypes[0]; });
}

template <class T, class S, bool kSameDtype, template <class, class> class Accumulator>
void run(const Batch& batch, const Launch& launch) {
  const auto n = static_cast<T>(batch.n);
  KernelArgs<T> args;
  args.counts = batch.counts;
  args.models = static_cast<int>(batch.n);
  args.first = (args.models - 1) % kGroup + 1;
  args.segments = static_cast<int>(batch.segments);
  args.one_type = one_type(batch);
  args.type = batch.dtypes[0];
  args.constants = {static_cast<T>(batch.scale), n, static_cast<T>(batch.required), static_cast<T>(batch.n - batch.required)};
  args.reciprocal = batch.n <= kMaxModels ? T(1) / n : std::numeric_limits<T>::quiet_NaN();
  args.subtracted = batch.task_vectors ? T(0) : T(1);
  launch.run(merge_tiles<T, S, kSameDtype, Accumulator>, args, kThreads);
}

template <class T, class S, bool kSameDtype>
void run(const Batch& batch, const Launch& launch) {
  if (batch.required == batch.n) run<T, S, kSameDtype, Unanimous>(batch, launch);
  else run<T, S, kSameDtype, Majority>(batch, launch);
}

template <class T>
void run(const Batch& batch, const Launch& launch) {
  with_type<T>(batch.result, [&](auto type) {
    using S = decltype(type);
    if constexpr (sizeof(T) == sizeof(typename S::Float))
      if (batch.dtypes[0] == batch.result && one_type(batch)) return run<T, S, true>(batch, launch);
    run<T, S, false>(batch, launch);
  });
}

}  // namespace

void merge_cuda(const Batch& batch, const std::int64_t* table, std::int64_t words, std::int64_t tiles, std::int64_t max_blocks,
                int device, std::uint64_t stream) {
  if (!tiles) return;
  const OnDevice current(device);
  const PlainArithmetic plain;  // λ is rounded here
  const Launch launch{table, words, tiles, max_blocks, device, reinterpret_cast<cudaStream_t>(stream)};
  launch.require(std::max(batch.n, batch.segments));
  require_on_device(batch.counts, device, "the memory for the counts");
  is_double(batch) ? run<double>(batch, launch) : run<float>(batch, launch);
}

}  // namespace negmerge
