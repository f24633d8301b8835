// The interface of the CUDA kernel for low-rank differences: negmerge_fast/core/low_rank.py says what it computes.
#pragma once

#include "batch.h"

namespace negmerge {

// A tile is the part of a matrix that a warp computes; those at the edges are smaller.
constexpr int kExpandRows = 8;
constexpr int kExpandColumns = 128;

// Launches it on a stream of a device, and does not wait for it: as merge_cuda (merge_cuda.h), with a table of as many integers.
// pack_expand_for_device of negmerge_fast/core/descriptors.py says what the table holds. result: the storage type of base and output;
// the arithmetic type where there is no base. is_double: whether the arithmetic type is double.
void expand_cuda(Dtype result, bool is_double, std::int64_t boxes, const std::int64_t* table, std::int64_t words, std::int64_t tiles,
                 std::int64_t max_blocks, int device, std::uint64_t stream);

}  // namespace negmerge
