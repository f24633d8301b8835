// The CUDA kernel that applies consensus deltas: one launch for a batch. apply_cuda.cu launches it.
//
// A tile is a block of ranks, of one warp. A lane loads 32 bits of the mask; the warp lists the elements in the mask in its shared
// memory, and takes them in order, one for each lane, several at once. So means and saved elements are loaded as they lie, those of
// the base in nearly that order, and time and memory go into the mask and what is in it. Where the base is to be copied the warp
// does so first, 16 bytes of a lane at a time where base and out are aligned. To save and to restore is the same without arithmetic.
//
// tests/csrc/test_apply_cuda.py bounds the instructions, and says how many loads are under way.
#pragma once

#include <cuda_runtime.h>

#include "apply_cuda.h"
#include "cuda_memory.h"
#include "dtypes.h"
#include "merge_cuda.h"
#include "merge_rule.h"

namespace negmerge {
namespace {

// Chosen by reasoning, not measured: registers and shared memory allow so many warps at a time, and with 10 % of the elements in a
// mask, a group has nearly all of a tile. bench/tuning/gpu_session.py measures the kernel.
constexpr int kApplyThreads = 128;  // of a block
constexpr int kApplyBlocks = 8;     // that a processor can run at a time: the compiler limits registers
constexpr int kApplyGroup = 4;      // elements of a lane whose loads are under way at once
constexpr int kApplyCopied = 2;     // 16 bytes of the base, of a lane: more take registers from what is not copied
constexpr int kApplyWarps = kApplyThreads / 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// What describes a segment: its elements, and addresses.
enum DeltaColumn { kNumel, kMask, kMeans, kRanks, kBase, kSaved, kOut, kDeltaColumns };

// What goes along with a launch. memory: the table of a batch in the device's memory; null: it is in `table`.
template <class T>
struct ApplyArgs {
  const std::int64_t* memory;
  std::int64_t* counts;  // [segments, kApplied]
  int segments, tiles;
  Act act;
  Constants<T> constants;  // of which only λ is used
  std::int64_t table[kCudaTable];

  // The number of tiles before a segment, and whether base and out are multiples of 16.
  __device__ const std::int64_t* tiling(int segment) const { return (memory ? memory : table) + 2 * std::int64_t{segment}; }
  __device__ const std::int64_t* row(int segment) const { return tiling(segments + 1) + std::int64_t{segment} * kDeltaColumns; }
};
static_assert(sizeof(ApplyArgs<double>) <= 4096, "every driver takes so much");

struct Applied {
  int changed = 0, nonfinite = 0;
};

// A value at an address that is known to be aligned to its size, or at any.
template <bool kNatural, class V>
__device__ V load_at(const char* from) {
  if constexpr (kNatural) return load<V>(from);
  else return load_anywhere<V>(from);
}
template <bool kNatural, class V>
__device__ void store_at(char* to, V value) {
  if constexpr (kNatural) store(to, value);
  else store_anywhere(to, value);
}

// Copies elements of type V: each lane every 32nd of them, from one on.
template <bool kNatural, class V>
__device__ void copy_strided(char* to, const char* from, int element, int count) {
#pragma unroll 4
  for (; element < count; element += 32)
    store_at<kNatural>(to + element * sizeof(V), load_at<kNatural, V>(from + element * sizeof(V)));
}

// Copies the base of a tile, in which are `count` elements.
template <bool kNatural, class Bits>
__device__ void copy_base(char* to, const char* from, int count, bool aligned, int lane) {
  constexpr int kAtOnce = 16 / sizeof(Bits);
  int done = 0;
  if (kNatural && aligned) {
    done = count - count % kAtOnce;
    uint4 parts[kApplyCopied];
    for (int first = lane; first < done / kAtOnce; first += 32 * kApplyCopied) {
#pragma unroll
      for (int k = 0; k < kApplyCopied; ++k)
        if (first + 32 * k < done / kAtOnce) parts[k] = load<uint4>(from + 16 * (first + 32 * k));
#pragma unroll
      for (int k = 0; k < kApplyCopied; ++k)
        if (first + 32 * k < done / kAtOnce) store(to + 16 * (first + 32 * k), parts[k]);
    }
  }
  copy_strided<kNatural, Bits>(to, from, done + lane, count);
}

// Writes the positions of the elements in a tile's mask, in order; returns how many they are. word: 32 bits of each lane.
__device__ int list_positions(unsigned word, int lane, std::uint16_t* positions) {
  const int own = __popc(word);
  int through = own;  // elements in the mask, of this lane and those before it
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(kWholeWarp, through, distance);
    if (lane >= distance) through += before;
  }
  int at = through - own;
  for (; word; word &= word - 1) positions[at++] = static_cast<std::uint16_t>(32 * lane + __ffs(word) - 1);
  return __shfl_sync(kWholeWarp, through, 31);
}

// Moves the elements in a tile's mask: to where they are saved, or back. in_place: the first element of the tile.
template <bool kNatural, class Bits>
__device__ void move_elements(bool save, char* saved, char* in_place, int count, int lane, const std::uint16_t* positions) {
#pragma unroll 4
  for (int one = lane; one < count; one += 32) {
    char* const element = in_place + positions[one] * sizeof(Bits);
    if (save) store(saved + one * sizeof(Bits), load_at<kNatural, Bits>(element));
    else store_at<kNatural>(element, load<Bits>(saved + one * sizeof(Bits)));
  }
}

// Applies a tile. kNatural: base and out are multiples of an element's size. Others are rare: one element at a time, which takes few
// registers.
template <class T, class S, class M, bool kNatural>
__device__ void apply_tile(const ApplyArgs<T>& args, const std::int64_t* row, std::int64_t tile, bool aligned, int lane,
                           std::uint16_t* positions, Applied& counts) {
  using Bits = typename S::Bits;
  using Float = typename S::Float;
  constexpr int kGroup = kNatural ? kApplyGroup : 1;
  constexpr std::int64_t kSize = sizeof(Bits);
  const std::int64_t start = tile * kRankBlock, left = row[kNumel] - start;
  const int elements = left < kRankBlock ? static_cast<int>(left) : static_cast<int>(kRankBlock);
  const std::int64_t rank = load<std::int64_t>(global(row[kRanks]) + 8 * tile);
  const unsigned word = 32 * lane < elements ? load<unsigned>(global(row[kMask]) + start / 8 + 4 * lane) : 0u;
  const bool saved = !row[kBase], writes = row[kOut], moved = args.act != Act::kApply;
  const std::int64_t out = row[kOut] + start * kSize;  // used only if row[kOut] is not 0
  const char* const stored_from = saved ? global(row[kSaved]) + rank * kSize : global(row[kBase]) + start * kSize;
  const char* const means = global(row[kMeans]) + rank * sizeof(typename M::Bits);

  if (writes && !saved && !moved && row[kBase] != row[kOut])
    copy_base<kNatural, Bits>(global(out), stored_from, elements, aligned, lane);
  const int count = list_positions(word, lane, positions);
  __syncwarp();  // the positions and the copy are there
  if (moved) {
    const bool save = args.act == Act::kSave;
    if (save || writes)
      move_elements<kNatural, Bits>(save, global(row[kSaved]) + rank * kSize,
                                    global(row[save ? kBase : kOut]) + start * kSize, count, lane, positions);
    __syncwarp();  // as below
    return;
  }
  for (int first = lane; first < count; first += 32 * kGroup) {
    int position[kGroup];
    Bits stored[kGroup];
    typename M::Bits mean[kGroup];
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int one = first + 32 * k < count ? first + 32 * k : count - 1;
      position[k] = positions[one];
      stored[k] = load_at<kNatural, Bits>(stored_from + (saved ? one : position[k]) * sizeof(Bits));
      mean[k] = load<typename M::Bits>(means + one * sizeof(typename M::Bits));
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (first + 32 * k >= count) break;
      const auto result = static_cast<Float>(negated_mean(widen<T, S>(stored[k]), widen<T, M>(mean[k]), args.constants));
      const bool finite = in_range<S>(result);
      const Bits bits = finite ? static_cast<Bits>(S::template round<typename S::Word>(result)) : stored[k];
      const bool changed = bits != stored[k];
      counts.changed += changed;
      counts.nonfinite += !finite;
      if (writes && (saved || changed)) store_at<kNatural>(global(out) + position[k] * sizeof(Bits), bits);
    }
  }
  __syncwarp();  // no lane needs the positions any more
}

template <class T>
__device__ void add_applied(const ApplyArgs<T>& args, int segment, const Applied& counts) {
  add_for_warp(args.counts + kApplied * std::int64_t{segment}, counts.changed);
  add_for_warp(args.counts + kApplied * std::int64_t{segment} + 1, counts.nonfinite);
}

// T: the arithmetic type. S, M: what the base and the means are stored as.
template <class T, class S, class M>
__global__ void __launch_bounds__(kApplyThreads, kApplyBlocks) apply_tiles(const __grid_constant__ ApplyArgs<T> args) {
  __shared__ std::uint16_t positions[kApplyWarps][kRankBlock];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  // Blocks take equal numbers of consecutive tiles, and their warps one after the other.
  int tile = static_cast<int>(std::uint64_t{blockIdx.x} * args.tiles / gridDim.x) + warp;
  const int end = static_cast<int>((std::uint64_t{blockIdx.x} + 1) * args.tiles / gridDim.x);
  if (tile >= end) return;
  int segment = segment_of(args.segments, tile, [&](int i) { return *args.tiling(i); });
  Applied counts;
  for (; tile < end; tile += kApplyWarps) {
    if (*args.tiling(segment + 1) <= tile) {
      add_applied(args, segment, counts);
      counts = {};
      do ++segment;
      while (*args.tiling(segment + 1) <= tile);
    }
    const std::int64_t *const tiling = args.tiling(segment), *const row = args.row(segment);
    const std::int64_t in_segment = tile - tiling[0];
    if (static_cast<std::uint64_t>(row[kBase] | row[kOut]) % sizeof(typename S::Bits) == 0)
      apply_tile<T, S, M, true>(args, row, in_segment, tiling[1], lane, positions[warp], counts);
    else
      apply_tile<T, S, M, false>(args, row, in_segment, false, lane, positions[warp], counts);
  }
  add_applied(args, segment, counts);
}

}  // namespace
}  // namespace negmerge
