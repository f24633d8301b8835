// The interface of the CUDA kernel for consensus deltas: negmerge_fast/core/delta.py says what it computes.
#pragma once

#include "delta.h"

namespace negmerge {

// Launches it on a stream of a device, and does not wait for it: as merge_cuda (merge_cuda.h), with a table of as many integers.
// pack_delta_for_device of negmerge_fast/core/descriptors.py says what the table holds; the descriptors of the batch are not read.
void apply_cuda(const DeltaBatch& batch, const std::int64_t* table, std::int64_t words, std::int64_t tiles,
                std::int64_t max_blocks, int device, std::uint64_t stream);

}  // namespace negmerge
