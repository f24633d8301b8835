// The CUDA kernel as the bindings see it.
#pragma once

#include <cstdint>

#include "batch.h"

namespace negmerge {

// Launches a merge on a stream of a device and returns; batch.table and batch.counts are in the device's memory, and so
// is all that the table points to. elements: of the longest segment. Throws std::runtime_error with CUDA's reason.
void merge_cuda(const Batch& batch, std::int64_t elements, int device, std::uint64_t stream);

}  // namespace negmerge
