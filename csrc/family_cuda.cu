// Launches the CUDA kernel of family_tiles.h: one launch for a batch.
#include "family_cuda.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "arithmetic.h"
#include "cuda_launch.h"
#include "family_tiles.h"

namespace negmerge {
namespace {

template <class T, class S, int kTotalled>
void run(const Batch& batch, const Launch& launch) {
  FamilyArgs<T> args;
  args.counts = batch.counts;
  args.models = static_cast<int>(batch.n);
  args.segments = static_cast<int>(batch.segments);
  args.gate = batch.family->gate;
  args.election = batch.family->election;
  args.reduction = batch.family->reduction;
  args.seed = batch.family->seed;
  args.constants = family_constants<T>(batch);
  args.subtracted = batch.task_vectors ? T(0) : T(1);
  launch.run(family_tiles<T, S, kTotalled>, args, kFamilyThreads);
}

// Means and sums, TIES and DARE, MagMax and weighted NegMerge have kernels of their own; each takes time to compile.
template <class T, class S>
void run(const Batch& batch, const Launch& launch) {
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
void run(const Batch& batch, const Launch& launch) {
  with_type<T>(batch.result, [&](auto type) { run<T, decltype(type)>(batch, launch); });
}

}  // namespace

void family_cuda(const Batch& batch, const std::int64_t* table, std::int64_t words, std::int64_t tiles, std::int64_t max_blocks,
                 int device, std::uint64_t stream) {
  if (!tiles) return;
  const OnDevice current(device);
  const PlainArithmetic plain;  // numbers are rounded here
  const Launch launch{table, words, tiles, max_blocks, device, reinterpret_cast<cudaStream_t>(stream)};
  launch.require(std::max(batch.n, batch.segments));
  require_on_device(batch.counts, device, "the memory for the counts");
  is_double(batch) ? run<double>(batch, launch) : run<float>(batch, launch);
}

}  // namespace negmerge
