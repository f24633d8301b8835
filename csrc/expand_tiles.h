// The CUDA kernel that writes low-rank differences: one launch for a batch. expand_cuda.cu launches it.
//
//     d[i, m] = s · Σ_r left[i, r] · right[r, m]      each product and each sum rounded, r ascending
//
// A warp computes a tile of 8 rows and 128 columns, a lane every 32nd column of all 8 rows. So a number of the right factor is loaded
// once for 8 elements, as it lies, and one of the left once for 128, from shared memory. What follows in a block are the next rows of the
// same columns, whose right factor is in the first-level cache.
//
// What bounds it: 2 · rank operations an element, and a product and a sum that are rounded one by one take two instructions where
// others take one. An H100 has 33 T of these a second and writes 0.75 T elements of F32 to its memory (3 TB/s): from a rank of 22 on
// arithmetic is the limit, not memory. 64 of the 81 instructions of the loop over r are such (tests/csrc/test_expand_cuda.py): at most
// 0.79 of the rate. Computed from published numbers, not measured.
#pragma once

#include <cuda_runtime.h>

#include "cuda_memory.h"
#include "dtypes.h"
#include "expand_cuda.h"
#include "merge_cuda.h"
#include "merge_rule.h"

namespace negmerge {
namespace {

// Chosen by reasoning, not measured. While a warp waits for the right factor of one r, the others of its scheduler have 80
// instructions each: five are enough for the second-level cache. To unroll the loop takes more registers, and no fewer instructions.
constexpr int kExpandThreads = 128;  // of a block
template <class T>
constexpr int kExpandBlocks = sizeof(T) == 8 ? 4 : 5;  // that a processor can run at a time: the compiler limits registers
constexpr int kExpandWarps = kExpandThreads / 32;
constexpr int kExpandOfLane = kExpandColumns / 32;  // columns
constexpr int kExpandRanks = 32;                    // of the left factor, that are in shared memory at a time: one for each lane

// What describes a box: whole rows of whole matrices, or a part of a matrix. Addresses are of its first element.
// kStride: the columns of the tensor. kScale: the bits of s as a double.
enum BoxColumn { kLeft, kRight, kBoxBase, kBoxOut, kRows, kColumns, kStride, kRank, kScale, kBoxColumns };

// What goes along with a launch. memory: the table of a batch in the device's memory; null: it is in `table`.
struct ExpandArgs {
  const std::int64_t* memory;
  int boxes, tiles;
  std::int64_t table[kCudaTable];

  // The number of tiles before a box.
  __device__ std::int64_t before(int box) const { return (memory ? memory : table)[box]; }
  __device__ const std::int64_t* row(int box) const {
    return (memory ? memory : table) + boxes + 1 + std::int64_t{box} * kBoxColumns;
  }
};
static_assert(sizeof(ExpandArgs) <= 4096, "every driver takes so much");

// Rounds any number to storage: beyond S's range to infinity, and NaN stays NaN.
template <class S>
__device__ typename S::Bits round_any(typename S::Float x) {
  using Word = typename S::Word;
#ifndef __CUDA_ARCH__
  if (!in_range<S>(x)) {
    constexpr Word kInfinity = ((Word{1} << S::kExponent) - 1) << S::kFraction;
    const Word sign = Word{std::signbit(x)} << (S::kExponent + S::kFraction);
    return static_cast<typename S::Bits>(sign | kInfinity | (x != x ? Word{1} << (S::kFraction - 1) : Word{0}));
  }
#endif
  return static_cast<typename S::Bits>(S::template round<Word>(x));
}

// An element of a factor. The next rows of the tile's columns need those of the right factor again: they stay in the caches.
template <class T>
__device__ T factor(const char* from) {
  return __ldg(reinterpret_cast<const T*>(from));
}

// The left factor's numbers of a warp.
template <class T>
struct alignas(16) LeftFactor {
  T numbers[kExpandRanks][kExpandRows];
};

// Adds the products of all ranks. left: of the tile's first element; right: of the lane's first column. What is beyond the edge of a box
// is not loaded, and its sums mean nothing.
template <class T>
__device__ void add_products(const char* left, const char* right, std::int64_t rank, std::int64_t stride, int rows, int columns, int lane,
                             LeftFactor<T>& shared, T (&sums)[kExpandRows][kExpandOfLane]) {
  T of_right[kExpandOfLane] = {};
  for (std::int64_t first = 0; first < rank; first += kExpandRanks) {
    const int ranks = rank - first < kExpandRanks ? static_cast<int>(rank - first) : kExpandRanks;
    __syncwarp();  // no lane needs the former numbers any more
    if (lane < ranks) {
      const char* from = left + (first + lane) * sizeof(T);
#pragma unroll
      for (int i = 0; i < kExpandRows; ++i, from += rank * sizeof(T))
        if (i < rows) shared.numbers[lane][i] = factor<T>(from);
    }
    __syncwarp();
#pragma unroll 1
    for (int r = 0; r < ranks; ++r, right += stride * sizeof(T)) {
#pragma unroll
      for (int k = 0; k < kExpandOfLane; ++k)
        if (lane + 32 * k < columns) of_right[k] = factor<T>(right + 32 * k * sizeof(T));
#pragma unroll
      for (int i = 0; i < kExpandRows; ++i) {
        const T of_left = shared.numbers[r][i];
#pragma unroll
        for (int k = 0; k < kExpandOfLane; ++k) sums[i][k] = sums[i][k] + of_left * of_right[k];
      }
    }
  }
}

// An element's bits at an address that is known to be aligned to its size, or at any.
template <bool kNatural, class Bits>
__device__ Bits load_bits(const char* from) {
  if constexpr (kNatural) return load<Bits>(from);
  else return load_anywhere<Bits>(from);
}

// Writes a tile. base: null if d is written.
template <class T, class S, bool kNatural>
__device__ void write_tile(const char* base, char* out, std::int64_t stride, int rows, int columns, int lane, T scale,
                           const T (&sums)[kExpandRows][kExpandOfLane]) {
  using Bits = typename S::Bits;
#pragma unroll
  for (int i = 0; i < kExpandRows; ++i) {
    if (i >= rows) break;
    Bits stored[kExpandOfLane] = {};
    if (base) {
#pragma unroll
      for (int k = 0; k < kExpandOfLane; ++k)
        if (lane + 32 * k < columns) stored[k] = load_bits<kNatural, Bits>(base + (lane + 32 * k) * sizeof(Bits));
      base += stride * sizeof(Bits);
    }
#pragma unroll
    for (int k = 0; k < kExpandOfLane; ++k) {
      const T d = scale * sums[i][k];
      const T x = base ? widen<T, S>(stored[k]) + d : d;
      const Bits bits = round_any<S>(static_cast<typename S::Float>(x));  // from double to 16 bits by way of float
      if (lane + 32 * k >= columns) continue;
      if constexpr (kNatural) store(out + (lane + 32 * k) * sizeof(Bits), bits);
      else store_anywhere(out + (lane + 32 * k) * sizeof(Bits), bits);
    }
    out += stride * sizeof(Bits);
  }
}

// Computes a tile of a box. Tiles of the same columns follow each other.
template <class T, class S>
__device__ void expand_tile(const std::int64_t* box, unsigned tile, int lane, LeftFactor<T>& shared) {
  constexpr std::int64_t kSize = sizeof(typename S::Bits);
  const std::int64_t rows = box[kRows], columns = box[kColumns], stride = box[kStride], rank = box[kRank];
  // Fewer than 2^31, as all tiles: 64-bit divisions would take as long as a rank of three.
  const unsigned down = static_cast<unsigned>((rows + kExpandRows - 1) / kExpandRows);
  const unsigned across = static_cast<unsigned>((columns + kExpandColumns - 1) / kExpandColumns);
  const unsigned band = tile / down;
  const std::int64_t matrix = band / across;
  const std::int64_t row = std::int64_t{tile - band * down} * kExpandRows;
  const std::int64_t column = std::int64_t{band % across} * kExpandColumns;

  const int rows_here = rows - row < kExpandRows ? static_cast<int>(rows - row) : kExpandRows;
  const int columns_here = columns - column < kExpandColumns ? static_cast<int>(columns - column) : kExpandColumns;
  T sums[kExpandRows][kExpandOfLane] = {};
  add_products<T>(global(box[kLeft]) + (matrix * rows + row) * rank * sizeof(T),
                  global(box[kRight]) + (matrix * rank * stride + column + lane) * sizeof(T), rank, stride, rows_here, columns_here, lane,
                  shared, sums);

  const std::int64_t at = ((matrix * rows + row) * stride + column) * kSize;
  const char* const base = box[kBoxBase] ? global(box[kBoxBase] + at) : nullptr;
  char* const out = global(box[kBoxOut] + at);
  const T scale = static_cast<T>(bits_as<double>(box[kScale]));
  if (static_cast<std::uint64_t>(box[kBoxBase] | box[kBoxOut]) % kSize == 0)
    write_tile<T, S, true>(base, out, stride, rows_here, columns_here, lane, scale, sums);
  else
    write_tile<T, S, false>(base, out, stride, rows_here, columns_here, lane, scale, sums);
}

// T: the arithmetic type. S: what base and output are stored as.
template <class T, class S>
__global__ void __launch_bounds__(kExpandThreads, kExpandBlocks<T>) expand_tiles(const __grid_constant__ ExpandArgs args) {
  __shared__ LeftFactor<T> shared[kExpandWarps];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  // Blocks take equal numbers of consecutive tiles, and their warps one after the other.
  int tile = static_cast<int>(std::uint64_t{blockIdx.x} * args.tiles / gridDim.x) + warp;
  const int end = static_cast<int>((std::uint64_t{blockIdx.x} + 1) * args.tiles / gridDim.x);
  if (tile >= end) return;
  int box = segment_of(args.boxes, tile, [&](int i) { return args.before(i); });  // none is empty
  for (; tile < end; tile += kExpandWarps) {
    while (args.before(box + 1) <= tile) ++box;
    expand_tile<T, S>(args.row(box), static_cast<unsigned>(tile - args.before(box)), lane, shared[warp]);
  }
}

}  // namespace
}  // namespace negmerge
