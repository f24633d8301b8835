// Launches the CUDA kernel of expand_tiles.h: one launch for a batch.
#include "expand_cuda.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "cuda_launch.h"
#include "expand_tiles.h"

namespace negmerge {
namespace {

constexpr int kExpandWaves = 16;  // blocks for each one that runs at a time: as of merge_cuda.cu

template <class T, class S>
void expand(const ExpandArgs& args, std::int64_t max_blocks, int device, cudaStream_t stream) {
  void (*const kernel)(ExpandArgs) = expand_tiles<T, S>;
  const std::int64_t full = (args.tiles + kExpandWarps - 1) / kExpandWarps;  // blocks with a tile for each warp, but for the last
  const auto blocks = static_cast<unsigned>(
      std::min({full, max_blocks, blocks_at_a_time(kernel, kExpandThreads, device) * kExpandWaves}));
  void* arguments[] = {const_cast<ExpandArgs*>(&args)};
  check(cudaLaunchKernel(kernel, dim3(blocks), dim3(kExpandThreads), arguments, 0, stream), "launch");
}

template <class T>
void expand(Dtype result, const ExpandArgs& args, std::int64_t max_blocks, int device, cudaStream_t stream) {
  switch (result) {
    case kF64:
      if constexpr (sizeof(T) == 8) return expand<T, F64>(args, max_blocks, device, stream);
      throw std::invalid_argument("a base of F64 with arithmetic of F32");
    case kF32: return expand<T, F32>(args, max_blocks, device, stream);
    case kF16: return expand<T, F16>(args, max_blocks, device, stream);
    case kBF16: return expand<T, BF16>(args, max_blocks, device, stream);
  }
}

}  // namespace

void expand_cuda(Dtype result, bool is_double, std::int64_t boxes, const std::int64_t* table, std::int64_t words, std::int64_t tiles,
                 std::int64_t max_blocks, int device, std::uint64_t stream) {
  if (!tiles) return;
  constexpr std::int64_t kMax = std::numeric_limits<int>::max();
  if (words > kCudaTable) throw std::invalid_argument("the table does not go along with a launch");
  if (std::max(tiles, boxes) >= kMax - kExpandWarps) throw std::invalid_argument("a batch for several launches");
  const OnDevice current(device);
  if (!words) require_on_device(table, device, "the table");
  ExpandArgs args;
  args.memory = words ? nullptr : table;
  args.boxes = static_cast<int>(boxes);
  args.tiles = static_cast<int>(tiles);
  std::copy_n(table, words, args.table);
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  is_double ? expand<double>(result, args, max_blocks, device, on) : expand<float>(result, args, max_blocks, device, on);
}

}  // namespace negmerge
