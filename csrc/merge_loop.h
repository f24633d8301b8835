// One instruction set's copy of the loop, and what the threads of merge_cpu.cpp share.
#pragma once

#include "batch.h"

namespace negmerge {

// Where in a batch: an element of a segment.
struct Position {
  std::int64_t segment, start;
};

// Merges `elements` elements from a place on, running on into the segments that follow; adds to the batch's counts.
using Loop = void (*)(const Batch& batch, Position from, std::int64_t elements);

}  // namespace negmerge
