// Low-rank differences: negmerge_fast/core/low_rank.py. Addresses are 64-bit integers.
//
//     d[i, m] = s · Σ_r B[i, r] · A[r, m]       (the sum starts at +0; products and sums are rounded one by one)
//     x       = round(b + d)                    (of merged models)
#pragma once

#include <string>

#include "batch.h"

namespace negmerge {

// A difference of a whole tensor, and the first element that is asked for: the fields of LowRank but the owner, then begin.
struct Expansion {
  const char *left, *right;
  std::int64_t matrices, rows, columns, rank;
  double scale;        // 64 bits, too
  const char* panels;  // right factors of all matrices in panels, or null
  std::int64_t begin;
};
static_assert(sizeof(Expansion) == 72, "nine 64-bit integers of a descriptor");

// Model k of a segment; null if it is an ordinary operand.
NEGMERGE_INLINE const Expansion* expansion_of(const Batch& batch, std::int64_t segment, std::int64_t k) {
  const std::int64_t at = batch.expansions[segment * batch.n + k];
  return at ? reinterpret_cast<const Expansion*>(batch.expansions + at) : nullptr;
}

// What is to be written. The descriptors of a segment are its number of elements, the addresses of base and out, and an Expansion.
struct ExpandBatch {
  bool is_double;  // the arithmetic type
  bool adds;       // b + d is written, in the type `result`; else d in the arithmetic type
  Dtype result;
  std::int64_t segments;
  const std::int64_t* descriptors;  // [segments, 12]
};

// Elements of a tensor's rows, those of all matrices one after the other.
struct Rectangle {
  std::int64_t row, column, rows, columns;
};

// Where a rectangle is written: addresses of its first element, and bytes from row to row. base: null if d is written.
struct Target {
  const char* base;
  std::int64_t base_stride;
  char* out;
  std::int64_t out_stride;
};

// Bytes of a row of right factors that are multiplied at once.
constexpr std::int64_t kPanel = 256;

// Right factors of a rectangle in panels: kPanel bytes of each of them, one after the other, those behind the last column zero. From one
// panel to the next there are rank · kPanel bytes.
struct Panels {
  char* memory;    // aligned to 64, of one panel at least
  bool are_there;  // or not, and the memory may be used
};

// Whether right factors from a column on can be read from the panels that the tensor has.
NEGMERGE_INLINE bool are_in_panels(const Expansion& e, std::int64_t size, std::int64_t column) {
  return e.panels && column * size % kPanel == 0;
}

// Copies right factors of a matrix from a column on to panels. size: of an element.
void pack_panels(const Expansion& expansion, std::int64_t size, std::int64_t matrix, std::int64_t column, std::int64_t columns,
                 char* panels);

// The loop of one instruction set (low_rank_loop.cpp): writes a rectangle in type `written`.
using ExpandLoop = void (*)(const Expansion& expansion, bool is_double, Dtype written, const Rectangle& rectangle, const Target& target,
                            const Panels& panels);

// Writes low-rank differences on at most `threads` threads. Throws std::invalid_argument for an instruction set that is not here.
void expand_cpu(const ExpandBatch& batch, int threads, const std::string& instruction_set);

// merge_cpu for a batch with expansions.
void merge_low_rank(const Batch& batch, int threads, const std::string& instruction_set);

}  // namespace negmerge
