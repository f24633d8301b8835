// The interface between Python and the kernels: one plain struct, with addresses as 64-bit integers.
#pragma once

#include <cstdint>

#include "merge_rule.h"

namespace negmerge {

// Storage types by code: those of negmerge_fast/core/dtypes.py.
enum Dtype : std::uint8_t { kF64, kF32, kF16, kBF16 };

// What is counted of a segment: elements that agreed, that were not finite, and that were vetoed by zero.
constexpr int kCounted = 3;

constexpr std::int64_t kSizes[] = {8, 4, 2, 2};

// What another method does, or one with a weight for each element: negmerge_fast/core/choices.py, whose enumerations these are.
enum Gate : int { kNoGate, kMagnitude, kRandom };
enum Election : int { kAll, kAgreement, kConflict, kSignOfSum, kVotesCounted, kMasks };
enum Reduction : int { kSum, kMean, kLargest };

// What is counted of a segment then: also elements that only a weight of zero keeps from being changed.
constexpr int kFamilyCounted = 4;

// Storage types of weights are those of models, and integers.
constexpr int kWeightU8 = 4, kWeightI32 = 5, kWeightI64 = 6;
constexpr std::int64_t kWeightSizes[] = {8, 4, 2, 2, 1, 4, 8};

struct Family {
  Gate gate;
  Election election;
  Reduction reduction;
  std::uint64_t seed;
  double mask_scale;
  const double* numbers;      // [3, n]: factors, votes, and how many of 2^32 numbers of the generator keep d_k
  const std::int64_t* terms;  // [segments, 4 + 2n]: begin, key, the weights' address or 0, their type; low and high as double
};

// Segments of one signature. The descriptors of a segment are its number of elements, then the addresses of base (0: zeros),
// out (0: count only) and x_1 … x_n: negmerge_fast/core/batch.py and descriptors.py.
struct Batch {
  Dtype result;           // of the base and of the output
  const Dtype* dtypes;    // of each model
  std::int64_t n;         // models, at least 1
  bool task_vectors;      // the models' operands hold d_k, not x_k
  double scale;           // λ
  std::int64_t required;  // how many models must agree on the sign of an element
  std::int64_t segments;
  const std::int64_t* descriptors;  // [segments, 3 + n]
  std::int64_t* counts;             // [segments, kCounted], to which is added
  // Of the CPU kernel: out is the mean, in the arithmetic type, or +0 (core/delta.py). Then scale is -1.
  bool consensus = false;
  // Of the CPU kernel: int64[segments, n], where in this array, in elements, an Expansion stands that takes a model's place, or 0
  // (low_rank.h). Null: there are none.
  const std::int64_t* expansions = nullptr;
  // Null: the rule of merge_rule.h. Else counts is [segments, kFamilyCounted].
  const Family* family = nullptr;

  NEGMERGE_INLINE const std::int64_t* row(std::int64_t segment) const { return descriptors + segment * (3 + n); }
};

NEGMERGE_INLINE bool is_double(const Batch& batch) {
  bool found = batch.result == kF64;
  for (std::int64_t k = 0; k < batch.n; ++k) found |= batch.dtypes[k] == kF64;
  return found;
}

}  // namespace negmerge
