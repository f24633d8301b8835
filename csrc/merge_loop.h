// The loop of one instruction set, as merge_cpu.cpp calls it.
#pragma once

#include "batch.h"

namespace negmerge {

// A position in a batch: an element of a segment.
struct Position {
  std::int64_t segment, start;
};

// Merges `elements` elements from a position on, across segments, and adds to the batch's counts. in_cache: the batch is so small
// that it is probably in a cache; else operands are prefetched, and an output apart from the base is stored past the cache, through
// which its old bytes would be read first.
using Loop = void (*)(const Batch& batch, Position from, std::int64_t elements, bool in_cache);

}  // namespace negmerge
