// What the CUDA kernels share: loads and stores of a device's memory at any address, counts of a warp, and where a tile is.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtypes.h"

namespace negmerge {
namespace {

// A pointer that the compiler knows to be one to global memory.
__device__ char* global(std::int64_t address) {
  char* const pointer = reinterpret_cast<char*>(address);
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// The type that one instruction loads or stores, for so many bytes.
template <int bytes> struct Access { using type = uint4; };
template <> struct Access<8> { using type = uint2; };
template <> struct Access<4> { using type = unsigned; };
template <> struct Access<2> { using type = unsigned short; };
template <> struct Access<1> { using type = unsigned char; };

// Loads a value that is aligned to 16 bytes or, if it is smaller, to its size. Hardly anything is read twice, so that it is
// marked to be evicted from the caches first.
template <class V>
__device__ V load(const char* from) {
  using Part = typename Access<sizeof(V)>::type;
  Part parts[sizeof(V) / sizeof(Part)];
#pragma unroll
  for (unsigned i = 0; i < sizeof(V) / sizeof(Part); ++i) parts[i] = __ldcs(reinterpret_cast<const Part*>(from) + i);
  return bits_as<V>(parts);
}

// Stores one. What reads it next may find it in the cache.
template <class V>
__device__ void store(char* to, const V& value) {
  using Part = typename Access<sizeof(V)>::type;
  Part parts[sizeof(V) / sizeof(Part)];
  memcpy(parts, &value, sizeof value);
#pragma unroll
  for (unsigned i = 0; i < sizeof(V) / sizeof(Part); ++i) reinterpret_cast<Part*>(to)[i] = parts[i];
}

// The same at any address: the hardware loads and stores only at multiples of the size.
template <class V>
__device__ V load_anywhere(const char* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % sizeof(V) == 0) return load<V>(from);
  V value = 0;
#pragma unroll
  for (unsigned i = 0; i < sizeof(V); ++i) value |= static_cast<V>(static_cast<V>(load<unsigned char>(from + i)) << 8 * i);
  return value;
}

template <class V>
__device__ void store_anywhere(char* to, V value) {
  if (reinterpret_cast<std::uintptr_t>(to) % sizeof(V) == 0) return store(to, value);
#pragma unroll
  for (unsigned i = 0; i < sizeof(V); ++i) store(to + i, static_cast<unsigned char>(value >> 8 * i));
}

// An element's bits as a number of the arithmetic type.
template <class T, class M>
__device__ T widen(typename M::Word bits) {
  return static_cast<T>(M::template widen<typename M::Float>(bits));
}

// Adds a warp's counts to a segment's.
__device__ void add_for_warp(std::int64_t* to, int count) {
  const int total = __reduce_add_sync(0xffffffffu, count);
  if (threadIdx.x % 32 || !total) return;
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(total));
}

// Binary search for the one of `count` segments that a tile is of. before(i): the number of tiles before segment i.
template <class Before>
__device__ int segment_of(int count, int tile, const Before& before) {
  int segment = 0;
  for (int high = count; high - segment > 1;) {
    const int middle = segment + (high - segment) / 2;
    (before(middle) <= tile ? segment : high) = middle;
  }
  return segment;
}

}  // namespace
}  // namespace negmerge
