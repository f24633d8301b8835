// The loop of one instruction set, as merge_cpu.cpp calls it.
#pragma once

#include "batch.h"

namespace negmerge {

// A position in a batch: an element of a segment.
struct Position {
  std::int64_t segment, start;
};

// Merges `elements` elements from a position on, across segments, and adds to the batch's counts. past_cache: an output apart from
// the base need not be in a cache afterwards; through the cache, its old bytes would be read first.
using Loop = void (*)(const Batch& batch, Position from, std::int64_t elements, bool past_cache);

}  // namespace negmerge
