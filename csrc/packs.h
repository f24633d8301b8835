// Packs of numbers in the registers of one instruction set, and how they are loaded, rounded and stored. Only for files that are
// compiled once for each instruction set: code for one must never be linked in place of the same code for another.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtypes.h"
#include "merge_rule.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace negmerge {
namespace {

#if defined(__AVX512F__)
constexpr int kPackBytes = 64;
#elif defined(__AVX2__)
constexpr int kPackBytes = 32;
#else
constexpr int kPackBytes = 16;
#endif

template <class E, int lanes>
struct Vector {
  typedef E type __attribute__((vector_size(sizeof(E) * lanes)));
};

// Packs for one arithmetic type: of numbers, and of other types with as many lanes.
template <class T>
struct Lanes {
  static constexpr int lanes = kPackBytes / sizeof(T);
  template <class E>
  using Of = typename Vector<E, lanes>::type;
  using N = Of<T>;
  using Mask = decltype(N{} < N{});
};

template <class E>
NEGMERGE_INLINE E read(const char* from) {
  E value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <class To, class From>
NEGMERGE_INLINE To convert(From from) {
  return __builtin_convertvector(from, To);
}

// 16-bit integers as 32-bit ones, and back if they fit. The compiler's own conversions take five instructions for these.
template <class Words, class Bits>
NEGMERGE_INLINE Words widened(Bits bits) {
#ifdef __AVX512F__
  if constexpr (sizeof(Bits) == 32 && sizeof(Words) == 64) return (Words)_mm512_cvtepu16_epi32((__m256i)bits);
#endif
#ifdef __AVX2__
  if constexpr (sizeof(Bits) == 16 && sizeof(Words) == 32) return (Words)_mm256_cvtepu16_epi32((__m128i)bits);
#endif
  return convert<Words>(bits);
}
template <class Bits, class Words>
NEGMERGE_INLINE Bits narrowed(Words words) {
#ifdef __AVX2__
  if constexpr (sizeof(Bits) == 16 && sizeof(Words) == 32) {
    const __m256i all = (__m256i)words;
    return (Bits)_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  }
#endif
  return convert<Bits>(words);
}

// Numbers of storage type M, loaded and widened; and numbers in M's range, rounded.
template <class M, class F, class Word, class Bits>
NEGMERGE_INLINE F load_floats(const char* from) {
#ifdef __F16C__
  if constexpr (M::kHalf && sizeof(F) == 16) return (F)_mm_cvtph_ps(_mm_loadu_si64(from));
  if constexpr (M::kHalf && sizeof(F) == 32) return (F)_mm256_cvtph_ps(read<__m128i>(from));
#endif
#ifdef __AVX512F__
  if constexpr (M::kHalf && sizeof(F) == 64) return (F)_mm512_cvtph_ps(read<__m256i>(from));
#endif
  return M::template widen<F>(widened<Word>(read<Bits>(from)));
}
template <class M, class Bits, class Word, class F>
NEGMERGE_INLINE Bits rounded_bits(F x) {
#ifdef __F16C__
  if constexpr (M::kHalf && sizeof(F) == 32) return (Bits)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#endif
#ifdef __AVX512F__
  if constexpr (M::kHalf && sizeof(F) == 64) return (Bits)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#endif
  return narrowed<Bits>(M::template round<Word>(x));
}

// Stores a value. past_cache: not through the cache; the address must allow it.
template <class Value>
NEGMERGE_INLINE void store(char* to, Value value, [[maybe_unused]] bool past_cache) {
#ifdef __AVX512F__
  if constexpr (sizeof value == 64)
    if (past_cache) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)value);
#endif
#ifdef __AVX2__
  if constexpr (sizeof value == 32)
    if (past_cache) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)value);
#endif
  memcpy(to, &value, sizeof value);
}

// Whether all lanes of a pack of integers are negative.
template <class Mask>
NEGMERGE_INLINE bool all_negative(Mask x) {
  constexpr bool wide = sizeof(x[0]) == 8;
#ifdef __AVX512F__
  if constexpr (sizeof x == 64)
    return wide ? _mm512_movepi64_mask((__m512i)x) == 0xff : _mm512_movepi32_mask((__m512i)x) == 0xffff;
#endif
#ifdef __AVX2__
  if constexpr (sizeof x == 32) return wide ? _mm256_movemask_pd((__m256d)x) == 0xf : _mm256_movemask_ps((__m256)x) == 0xff;
#endif
  std::uint64_t parts[sizeof x / 8], signs = wide ? 1ull << 63 : (1ull << 63 | 1ull << 31);
  memcpy(parts, &x, sizeof x);
  std::uint64_t found = signs;
  for (const std::uint64_t part : parts) found &= part;
  return found == signs;
}

}  // namespace
}  // namespace negmerge
