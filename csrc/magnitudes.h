// Magnitudes of differences: how many are below some bounds, and which are between them (negmerge_fast/core/bounds.py).
#pragma once

#include <cstdint>
#include <string>

#include "batch.h"

namespace negmerge {

// Two intervals of magnitudes, low ≤ |d_k| < high, for each model: one after the other. Without a second one its edges are 0.
constexpr int kEdges = 4;

// What is counted of a segment and a model: magnitudes below each edge, and how many were written. One that is not finite is below none.
constexpr int kMagnitudesCounted = kEdges + 1;

constexpr int kSpare = 4;

struct MagnitudeIntervals {
  const double* edges;    // [segments, n, kEdges]: numbers of the arithmetic type
  std::int64_t* counts;   // [segments, n, kMagnitudesCounted], written
  // Of the arithmetic type, [segments][n, elements + kSpare]: in the row of a segment and a model, the magnitudes that are in an interval, in
  // the order of the elements. What is behind them in the row may be written, too. Intervals of less than two numbers are only counted.
  void* found;
};

// Measures a batch on this thread; of the batch, nothing else is written, and its scale, required and counts are not used. Throws
// std::invalid_argument for an instruction set that is not one of instruction_sets().
void measure_magnitudes(const Batch& batch, const MagnitudeIntervals& intervals, const std::string& instruction_set);

}  // namespace negmerge
