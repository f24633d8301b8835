// Counts of prefixes: what the first 1, 2, … n models agree on, and which model keeps an element from agreeing.
//
// negmerge_fast/reports/counting.py says what is counted.
#pragma once

#include <string>

#include "batch.h"

namespace negmerge {

// What is counted for each model k, in this order. Prefixes: agreed, nonfinite, vetoed_by_zero, broken_by_zero, broken_by_sign.
// Models: sole_by_zero, sole_by_sign, sole_by_nonfinite, against_majority.
constexpr int kOfPrefix = 5, kOfModel = 4, kPrefixCounted = kOfPrefix + kOfModel;

// Borders between the bins of the magnitudes, ascending: a bin for what is below the first, and one for what is not below the last.
struct Bins {
  const double* edges;
  std::int64_t count;

  NEGMERGE_INLINE std::int64_t columns(std::int64_t n) const { return kPrefixCounted * n + count + 1; }
};

// Counts a batch on this thread: its scale and required are not used, and nothing is written but its counts, which are
// [segments, kPrefixCounted * n + count + 1]: n numbers of each kind, then the bins. Throws std::invalid_argument for an
// instruction set that is not one of instruction_sets().
void count_prefixes(const Batch& batch, const Bins& bins, const std::string& instruction_set);

}  // namespace negmerge
