// Launches the CUDA kernel of apply_tiles.h: one launch for a batch.
#include "apply_cuda.h"

#include <cuda_runtime.h>

#include <stdexcept>

#include "apply_tiles.h"
#include "arithmetic.h"
#include "cuda_launch.h"

namespace negmerge {
namespace {

template <class T, class S, class M>
void apply(const DeltaBatch& batch, const Launch& launch) {
  ApplyArgs<T> args;
  args.counts = batch.counts;
  args.segments = static_cast<int>(batch.segments);
  args.act = batch.act;
  args.constants = {static_cast<T>(batch.scale), T(1), T(1), T(0)};
  launch.run(apply_tiles<T, S, M>, args, kApplyThreads, kApplyWarps);
}

template <class T, class S>
void apply(const DeltaBatch& batch, const Launch& launch) {
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
void apply(const DeltaBatch& batch, const Launch& launch) {
  with_type<T>(batch.result, [&](auto type) { apply<T, decltype(type)>(batch, launch); });
}

}  // namespace

void apply_cuda(const DeltaBatch& batch, const std::int64_t* table, std::int64_t words, std::int64_t tiles,
                std::int64_t max_blocks, int device, std::uint64_t stream) {
  if (!tiles) return;
  if (batch.result == kF64 && !batch.is_double) throw std::invalid_argument("a base of F64 with arithmetic of F32");
  const OnDevice current(device);
  const PlainArithmetic plain;  // λ is rounded here
  const Launch launch{table, words, tiles, max_blocks, device, reinterpret_cast<cudaStream_t>(stream)};
  launch.require(batch.segments);
  require_on_device(batch.counts, device, "the memory for the counts");
  batch.is_double ? apply<double>(batch, launch) : apply<float>(batch, launch);
}

}  // namespace negmerge
