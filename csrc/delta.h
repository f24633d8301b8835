// Consensus deltas: negmerge_fast/core/delta.py. Addresses are 64-bit integers.
#pragma once

#include <string>

#include "batch.h"

namespace negmerge {

constexpr std::int64_t kRankBlock = 1024;  // RANK_BLOCK
constexpr std::int64_t kMaskWord = 64;     // MASK_WORD
constexpr int kApplied = 2;                // APPLIED: elements whose bits changed, and elements that were not finite

enum class Act : std::uint8_t { kApply, kRestore, kSave };

// Segments of one signature. The descriptors of a segment are the fields of DeltaSegment, without the owners.
struct DeltaBatch {
  Dtype result, means;
  bool is_double;  // the arithmetic type
  Act act;
  double scale;
  std::int64_t segments;
  const std::int64_t* descriptors;  // [segments, 7]
  std::int64_t* counts;             // [segments, kApplied], to which is added
};

struct DeltaSegment {
  std::int64_t numel;
  const char *mask, *means;
  const std::int64_t* ranks;
  const char* base;  // null: saved
  char *saved, *out;
};

NEGMERGE_INLINE DeltaSegment segment_of(const DeltaBatch& batch, std::int64_t segment) {
  const std::int64_t* row = batch.descriptors + 7 * segment;
  const auto address = [&](int i) { return reinterpret_cast<char*>(row[i]); };
  return {row[0], address(1), address(2), reinterpret_cast<const std::int64_t*>(row[3]), address(4), address(5), address(6)};
}

// The loops of one instruction set (delta_loop.cpp).
struct DeltaLoop {
  // Blocks of a segment, of kRankBlock elements each. in_cache: as of merge_loop.h.
  void (*apply)(const DeltaBatch& batch, std::int64_t segment, std::int64_t first_block, std::int64_t blocks, bool in_cache);
  // As backends/masks.py says.
  std::int64_t (*pack)(const char* dense, std::int64_t numel, Dtype arithmetic, Dtype stored, char* mask, char* means);
  void (*expand)(const char* mask, std::int64_t begin, std::int64_t numel, const char* means, Dtype stored, Dtype arithmetic,
                 char* dense);
  std::int64_t (*rank)(const char* mask, std::int64_t begin, std::int64_t end);
};

// The loops of an instruction set. Throws std::invalid_argument if this machine has none of the name.
const DeltaLoop& delta_loop(const std::string& instruction_set);

// Applies a batch of deltas, restores or saves, on at most `threads` threads. Throws std::invalid_argument as delta_loop.
void apply_cpu(const DeltaBatch& batch, int threads, const std::string& instruction_set);

// Writes how many elements are set before each block; returns how many are in all.
std::int64_t rank_blocks(const DeltaLoop& loop, const char* mask, std::int64_t numel, std::int64_t* ranks);

}  // namespace negmerge
