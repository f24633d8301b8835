// Elements of a tile, loaded in the arithmetic type, and bits of what they are compared with: for loops that count. As packs.h says, only
// for files that are compiled once for each instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "batch.h"
#include "packs.h"

namespace negmerge {
namespace {

using Word = std::uint64_t;

// Of each lane of a comparison.
template <class Mask>
NEGMERGE_INLINE Word bits_of(Mask mask) {
  constexpr bool wide = sizeof(mask[0]) == 8;
#if defined(__AVX512F__)
  if constexpr (sizeof mask == 64) return wide ? _mm512_movepi64_mask((__m512i)mask) : _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  if constexpr (sizeof mask == 32)
    return static_cast<unsigned>(wide ? _mm256_movemask_pd((__m256d)mask) : _mm256_movemask_ps((__m256)mask));
#elif defined(__SSE2__)
  if constexpr (sizeof mask == 16)
    return static_cast<unsigned>(wide ? _mm_movemask_pd((__m128d)mask) : _mm_movemask_ps((__m128)mask));
#endif
  Word bits = 0;
  for (std::size_t i = 0; i < sizeof mask / sizeof mask[0]; ++i) bits |= static_cast<Word>(mask[i] & 1) << i;
  return bits;
}

// A pack of a storage type M in the arithmetic type T.
template <class T, class M>
NEGMERGE_INLINE typename Lanes<T>::N load(const char* from) {
  using L = Lanes<T>;
  using F = typename L::template Of<typename M::Float>;
  return convert<typename L::N>(
      load_floats<M, F, typename L::template Of<typename M::Word>, typename L::template Of<typename M::Bits>>(from));
}

// Whether storage type M holds every value of S.
template <class S>
bool holds(Dtype dtype) {
  return dtype == kF64 || (dtype == kF32 ? kHolds<F32, S> : dtype == kF16 ? kHolds<F16, S> : kHolds<BF16, S>);
}
bool holds(Dtype dtype, Dtype base) {
  return base == kF64 ? holds<F64>(dtype) : base == kF32 ? holds<F32>(dtype) : base == kF16 ? holds<F16>(dtype) : holds<BF16>(dtype);
}

// The elements of a tile in the arithmetic type.
template <class T, int kTile>
struct TileNumbers {
  T values[kTile];

  void load(Dtype dtype, const char* from) {
    if (!from) return std::fill(values, values + kTile, T(0));
    with_type<T>(dtype, [&](auto type) {
      using S = decltype(type);
      constexpr int lanes = Lanes<T>::lanes;
      for (int i = 0; i < kTile; i += lanes) {
        const auto pack = negmerge::load<T, S>(from + i * sizeof(typename S::Bits));
        memcpy(values + i, &pack, sizeof pack);
      }
    });
  }

  // b as differences of models of a type subtract it.
  void round(Dtype dtype, const TileNumbers& b) {
    with_type<T>(dtype, [&](auto type) {
      using M = decltype(type);
      for (int i = 0; i < kTile; ++i)
        values[i] = static_cast<T>(as_stored<M, typename M::Word>(static_cast<typename M::Float>(b.values[i])));
    });
  }
};

}  // namespace
}  // namespace negmerge
