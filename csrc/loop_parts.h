// What the loops of merge_loop.cpp and family_loop.cpp share. Only for files that are compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "batch.h"
#include "dtypes.h"
#include "merge_loop.h"
#include "merge_rule.h"
#include "packs.h"

namespace negmerge {
namespace {

// b as d_k of a model of type M takes it, where M does not hold every value of the base's type.
template <class M, class T>
T rounded_one(T b) {
  return static_cast<T>(as_stored<M, typename M::Word>(static_cast<typename M::Float>(b)));
}
template <class T>
T rounded_one(Dtype dtype, T b) {
  return dtype == kF32 ? rounded_one<F32>(b) : dtype == kF16 ? rounded_one<F16>(b) : rounded_one<BF16>(b);
}

// Whether a type of models holds every value of the base's type S.
template <class S>
bool holds(Dtype dtype) {
  return dtype == kF64 || (dtype == kF32 ? kHolds<F32, S> : dtype == kF16 ? kHolds<F16, S> : kHolds<BF16, S>);
}

template <class T>
NEGMERGE_INLINE T load_one(Dtype dtype, const char* from) {
  switch (dtype) {
    case kF64: return static_cast<T>(read<double>(from));
    case kF32: return static_cast<T>(read<float>(from));
    case kF16: return static_cast<T>(F16::widen<float>(std::uint32_t{read<std::uint16_t>(from)}));
    default: return static_cast<T>(BF16::widen<float>(std::uint32_t{read<std::uint16_t>(from)}));
  }
}

// The part of a segment that is in one tile.
struct Tile {
  const std::int64_t* row = nullptr;  // of the descriptors; null: no tile
  std::int64_t segment = 0, start = 0;
  int count = 0;

  const char* base(const Batch& b) const {
    return row[1] ? reinterpret_cast<const char*>(row[1]) + start * kSizes[b.result] : nullptr;
  }
  template <class O>
  char* out() const {
    return row[2] ? reinterpret_cast<char*>(row[2]) + start * static_cast<std::int64_t>(sizeof(typename O::Bits)) : nullptr;
  }
  const char* model(const Batch& b, std::int64_t k) const {
    return reinterpret_cast<const char*>(row[3 + k]) + start * kSizes[b.dtypes[k]];
  }
};

// Takes the next tile of at most `most` elements from a range of a batch, if there is one.
NEGMERGE_INLINE Tile take_tile(const Batch& batch, Position& position, std::int64_t& elements, int most) {
  while (position.segment < batch.segments && position.start == batch.row(position.segment)[0]) position = {position.segment + 1, 0};
  if (!elements || position.segment == batch.segments) return {};
  const std::int64_t* row = batch.row(position.segment);
  std::int64_t count = row[0] - position.start;
  if (count > most) count = most;
  if (count > elements) count = elements;
  const Tile tile{row, position.segment, position.start, static_cast<int>(count)};
  position.start += count;
  elements -= count;
  return tile;
}

}  // namespace
}  // namespace negmerge
