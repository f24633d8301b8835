// The CUDA kernel as the bindings see it.
#pragma once

#include <cstdint>

#include "batch.h"

namespace negmerge {

// With the waves of merge_cuda.cu as good as 4096 on an H100, or better: bench/results/tune_gpu.jsonl.
#ifndef NEGMERGE_CUDA_TILE
#define NEGMERGE_CUDA_TILE 2048
#endif
// A segment is cut into tiles of so many elements, the last one shorter. A multiple of what a thread takes at a time.
constexpr std::int64_t kCudaTile = NEGMERGE_CUDA_TILE;

// Launches a merge on a stream of a device, and returns. batch.table is not looked at, batch.counts and all addresses are
// of the device's memory. memory, too: int64[segments + 1, 2], the number of tiles before each segment and whether all of
// its addresses are multiples of 16; then the table; then the models' storage types, a byte each. tiles: of all segments.
// Throws std::runtime_error with CUDA's reason, for a stream of another device, too, and std::invalid_argument for memory
// that is not the device's.
void merge_cuda(const Batch& batch, const std::int64_t* memory, std::int64_t tiles, int device, std::uint64_t stream);

}  // namespace negmerge
