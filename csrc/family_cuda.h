// The interface of the CUDA kernel of the other methods.
#pragma once

#include <cstdint>

#include "batch.h"

namespace negmerge {

// As merge_cuda.h says. batch.family->numbers is in main memory, batch.family->terms is not used: pack_family_for_device of
// negmerge_fast/core/descriptors.py says what the table holds.
void family_cuda(const Batch& batch, const std::int64_t* table, std::int64_t words, std::int64_t tiles, std::int64_t max_blocks,
                 int device, std::uint64_t stream);

}  // namespace negmerge
