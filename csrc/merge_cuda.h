// The interface of the CUDA kernel.
#pragma once

#include <cstdint>

#include "batch.h"

namespace negmerge {

// On an H100, with the waves of merge_cuda.cu, at least as fast as 4096: bench/results/tune_gpu.jsonl.
#ifndef NEGMERGE_CUDA_TILE
#define NEGMERGE_CUDA_TILE 2048
#endif
// Elements of a tile; the last one of a segment is shorter. A multiple of what a thread takes at a time.
constexpr std::int64_t kCudaTile = NEGMERGE_CUDA_TILE;

#ifndef NEGMERGE_CUDA_TABLE
#define NEGMERGE_CUDA_TABLE 496
#endif
// 64-bit integers of a batch's table that go along with a launch: with all else that does, 4 KiB at most.
constexpr std::int64_t kCudaTable = NEGMERGE_CUDA_TABLE;

// Launches a merge on a stream of a device, and does not wait for it. batch.descriptors is not used. batch.counts and all
// addresses in the table are in the device's memory; pack_for_device of negmerge_fast/core/descriptors.py says what the table
// holds. words: integers of a table in main memory, at most kCudaTable, which is not used afterwards; 0: it is in the device's
// memory. tiles: of all segments. max_blocks: of the launch. Throws std::runtime_error with CUDA's reason, also for a stream of
// another device, and std::invalid_argument for memory that is not the device's.
void merge_cuda(const Batch& batch, const std::int64_t* table, std::int64_t words, std::int64_t tiles, std::int64_t max_blocks,
                int device, std::uint64_t stream);

}  // namespace negmerge
