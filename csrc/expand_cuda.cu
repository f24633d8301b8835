// Launches the CUDA kernel of expand_tiles.h: one launch for a batch.
#include "expand_cuda.h"

#include <cuda_runtime.h>

#include <stdexcept>

#include "cuda_launch.h"
#include "expand_tiles.h"

namespace negmerge {
namespace {

template <class T>
void expand(Dtype result, std::int64_t boxes, const Launch& launch) {
  ExpandArgs args;
  args.boxes = static_cast<int>(boxes);
  with_type<T>(result, [&](auto type) { launch.run(expand_tiles<T, decltype(type)>, args, kExpandThreads, kExpandWarps); });
}

}  // namespace

void expand_cuda(Dtype result, bool is_double, std::int64_t boxes, const std::int64_t* table, std::int64_t words, std::int64_t tiles,
                 std::int64_t max_blocks, int device, std::uint64_t stream) {
  if (!tiles) return;
  if (result == kF64 && !is_double) throw std::invalid_argument("a base of F64 with arithmetic of F32");
  const OnDevice current(device);
  const Launch launch{table, words, tiles, max_blocks, device, reinterpret_cast<cudaStream_t>(stream)};
  launch.require(boxes);
  is_double ? expand<double>(result, boxes, launch) : expand<float>(result, boxes, launch);
}

}  // namespace negmerge
