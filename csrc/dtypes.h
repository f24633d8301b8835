// Conversions of storage types, by bits: widened to the arithmetic type when loaded (exact), rounded when stored (to nearest,
// ties to even). F is a float and U its bits, or packs of both (merge_rule.h).
//
// kExponent, kFraction: bits of these parts of a number, as in negmerge_fast/core/dtypes.py. kOverflow: the smallest magnitude
// that rounds to infinity. round is only for smaller ones: nothing else is stored.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "batch.h"
#include "merge_rule.h"

namespace negmerge {

template <class To, class From>
NEGMERGE_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

struct F64 {
  static constexpr bool kHalf = false;
  static constexpr int kExponent = 11, kFraction = 52;
  using Bits = std::uint64_t;
  using Float = double;  // what is rounded to storage, and its bits
  using Word = std::uint64_t;
  static constexpr double kOverflow = __builtin_huge_val();
  template <class F, class U>
  static NEGMERGE_INLINE F widen(U bits) { return bits_as<F>(bits); }
  template <class U, class F>
  static NEGMERGE_INLINE U round(F x) { return bits_as<U>(x); }
};

struct F32 {
  static constexpr bool kHalf = false;
  static constexpr int kExponent = 8, kFraction = 23;
  using Bits = std::uint32_t;
  using Float = float;
  using Word = std::uint32_t;
  static constexpr float kOverflow = __builtin_huge_valf();
  template <class F, class U>
  static NEGMERGE_INLINE F widen(U bits) { return bits_as<F>(bits); }
  template <class U, class F>
  static NEGMERGE_INLINE U round(F x) { return bits_as<U>(x); }
};

struct BF16 {
  static constexpr bool kHalf = false;
  static constexpr int kExponent = 8, kFraction = 7;
  using Bits = std::uint16_t;
  using Float = float;
  using Word = std::uint32_t;
  static constexpr float kOverflow = 0x1.ffp127f;
  template <class F, class U>
  static NEGMERGE_INLINE F widen(U bits) { return bits_as<F>(bits << 16); }
  template <class U, class F>
  static NEGMERGE_INLINE U round(F x) {
#ifdef __CUDA_ARCH__
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    const U bits = bits_as<U>(x);
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
#endif
  }
};

struct F16 {
  static constexpr bool kHalf = true;  // F16C converts it
  static constexpr int kExponent = 5, kFraction = 10;
  using Bits = std::uint16_t;
  using Float = float;
  using Word = std::uint32_t;
  static constexpr float kOverflow = 65520.0f;
  template <class F, class U>
  static NEGMERGE_INLINE F widen(U bits) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
#else
    const U magnitude = bits & 0x7fffu, least_normal = U{} + 0x400u, infinity = U{} + 0x7c00u, zero = U{};
    // Without a subnormal float, which may be slow: 2^23 + magnitude, less 2^23.
    const F subnormal = (bits_as<F>(magnitude | 0x4b000000u) - 8388608.0f) * 0x1p-24f;
    const U rebias = U{} + (112u << 23);
    const U normal = (magnitude << 13) + rebias + (magnitude >= infinity ? rebias : zero);
    const U widened = magnitude < least_normal ? bits_as<U>(subnormal) : normal;
    return bits_as<F>(widened | (bits & 0x8000u) << 16);
#endif
  }
  template <class U, class F>
  static NEGMERGE_INLINE U round(F x) {
#ifdef __CUDA_ARCH__
    return __half_as_ushort(__float2half_rn(x));
#else
    const U bits = bits_as<U>(x), magnitude = bits & 0x7fffffffu, least_normal = U{} + (113u << 23);
    const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Half of the step of float at 0.5 is half of the step of subnormals here.
    const U subnormal = bits_as<U>(bits_as<F>(magnitude) + 0.5f) - 0x3f000000u;
    return (magnitude < least_normal ? subnormal : normal) | (bits >> 16 & 0x8000u);
#endif
  }
};

// Two neighbours of 16 bits, rounded to storage in one word of 32.
template <class S>
NEGMERGE_INLINE std::uint32_t round_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  if constexpr (S::kHalf) return bits_as<std::uint32_t>(__floats2half2_rn(low, high));
  else return bits_as<std::uint32_t>(__floats2bfloat162_rn(low, high));
#else
  return S::template round<std::uint32_t>(low) | S::template round<std::uint32_t>(high) << 16;
#endif
}

namespace {

// Calls a function with an object of a storage type; those of F64 need that arithmetic. In no other file's place: see packs.h.
template <class T, class Function>
void with_type(Dtype dtype, Function function) {
  if (dtype == kF32) return function(F32{});
  if (dtype == kF16) return function(F16{});
  if (dtype == kBF16) return function(BF16{});
  if constexpr (sizeof(T) == 8) function(F64{});
}

}  // namespace
}  // namespace negmerge
