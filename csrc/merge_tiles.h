// The CUDA kernel: one launch for a batch. merge_cuda.cu launches it.
//
// Blocks take equal numbers of consecutive tiles, so that a batch of one large segment takes as long as one of thousands of
// small ones. A thread takes 16 bytes of the base, and for these elements all models, with the loads of 4 models under way at
// once. Elements of which this quick way is not sure are merged again one by one, as are those at odd addresses and at the end
// of a segment. Each thread counts over a segment; a warp adds its sum to the segment's counts.
//
// tests/csrc/test_merge_cuda.py bounds the instructions for an element, and says how many loads are under way.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "batch.h"
#include "cuda_elements.h"
#include "cuda_memory.h"
#include "dtypes.h"
#include "merge_cuda.h"
#include "merge_rule.h"

namespace negmerge {
namespace {

// The threads, and the tiles and waves of merge_cuda, were the fastest on an H100 for an earlier form of this kernel:
// bench/results/tune_gpu.jsonl.
#ifndef NEGMERGE_CUDA_THREADS
#define NEGMERGE_CUDA_THREADS 256
#endif
#ifndef NEGMERGE_CUDA_BLOCKS
#define NEGMERGE_CUDA_BLOCKS 3
#endif
#ifndef NEGMERGE_CUDA_GROUP
#define NEGMERGE_CUDA_GROUP 4
#endif
#ifndef NEGMERGE_CUDA_BASE_BYTES
#define NEGMERGE_CUDA_BASE_BYTES 16
#endif
constexpr int kThreads = NEGMERGE_CUDA_THREADS;       // of a block
constexpr int kBlocks = NEGMERGE_CUDA_BLOCKS;         // that a processor can run at a time: the compiler limits registers
constexpr int kGroup = NEGMERGE_CUDA_GROUP;           // models whose loads are under way at once
constexpr int kBaseBytes = NEGMERGE_CUDA_BASE_BYTES;  // of the base, for a thread at a time

// What goes along with a launch. memory: the table of a batch in the device's memory; null: it is in `table`.
// one_type: all models are stored as `type`, so that their types need not be loaded. first: models that begin the running
// values, models % kGroup or kGroup. subtracted: how often d_k subtracts the base: 0 of task vectors, else 1. reciprocal:
// 1 / n, rounded; NaN if n is too large for quick_quotient.
template <class T>
struct KernelArgs {
  const std::int64_t* memory;
  std::int64_t* counts;  // [segments, kCounted]
  int models, first, segments, tiles;
  bool one_type;
  Dtype type;
  Constants<T> constants;
  T reciprocal, subtracted;
  std::int64_t table[kCudaTable];
};
static_assert(sizeof(KernelArgs<double>) <= 4096, "every driver takes so much");

// The table of a batch: pack_for_device of negmerge_fast/core/descriptors.py says what it holds.
template <class T>
struct Table {
  const KernelArgs<T>& args;
  const std::int64_t* memory = args.memory ? args.memory : args.table;

  // The number of tiles before a segment, and whether all its addresses are multiples of 16.
  __device__ const std::int64_t* tiling(int segment) const { return memory + 2 * std::int64_t{segment}; }
  // Elements of a segment, then the addresses of base, out and the models.
  __device__ const std::int64_t* row(int segment) const {
    return tiling(args.segments + 1) + std::int64_t{segment} * (3 + args.models);
  }
  __device__ Dtype type(int model) const {
    return args.one_type ? args.type : reinterpret_cast<const Dtype*>(row(args.segments))[model];
  }
};

struct Counts {
  int agreed = 0, nonfinite = 0, vetoed = 0;
};

// Elements of a thread at a time; fewer if their accumulators would not fit the registers.
template <class T, class S>
constexpr int kElements = kBaseBytes / (sizeof(T) == 8 && sizeof(typename S::Bits) == 2 ? 4 : sizeof(typename S::Bits));

// sum / n as IEEE rounds it, but +0 for -0, in 4 instructions instead of 10 and a branch; n is a whole number of at most
// kMaxModels. The first quotient is wrong by less than 1.5 units in its last place, so that the remainder is exact. The last
// rounding is wrong only if sum / n is nearer than 2^-22 of such a unit to the middle of two numbers. It is never nearer than
// 0.5 / n, or in the middle of two subnormal numbers: there the remainder's quotient times 2^22, a whole number of the smallest
// units, is exact. NaN for larger n, whose reciprocal is NaN.
constexpr std::int64_t kMaxModels = 1 << 20;
template <class T>
__device__ T quick_quotient(T sum, T n, T reciprocal) {
  const T quotient = sum * reciprocal, remainder = std::fma(-quotient, n, sum);
  return std::fma(remainder * (reciprocal * T(0x1p22)), T(0x1p-22), quotient);
}

// The elements of a segment's base, zeros if it has none.
template <class S, int E>
__device__ Elements<S, E> load_base(const std::int64_t* row, std::int64_t element) {
  Elements<S, E> base = {};
  if (row[1]) base = load<Elements<S, E>>(global(row[1]) + element * sizeof(typename S::Bits));
  return base;
}

// Accumulates G models of storage type M over E elements. All loads come first, before the base is used, whose load is under
// way, too. kFirst: it loads the base, and the first model begins the running values.
template <class T, class S, class M, int E, int G, bool kFirst, class Accumulator>
__device__ void accumulate(const KernelArgs<T>& args, const std::int64_t* row, int model, std::int64_t element,
                           Elements<S, E>& base, Accumulator (&accumulators)[E]) {
  if constexpr (kFirst) base = load_base<S, E>(row, element);
  Elements<M, E> x[G];
#pragma unroll
  for (int k = 0; k < G; ++k)
    x[k] = load<Elements<M, E>>(global(row[3 + model + k]) + element * sizeof(typename M::Bits));
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const T from = origin<T, S, M>(widen<T>(base, e));
#pragma unroll
    for (int k = 0; k < G; ++k) {
      const T d = std::fma(-args.subtracted, from, widen<T>(x[k], e));  // x - 1 · from is rounded once, as x - from is
      if (kFirst && k == 0) accumulators[e].begin(d);
      else accumulators[e].accumulate(d);
    }
  }
}

// Loads the base, and accumulates n % kGroup models, or kGroup. Returns how many.
template <class T, class S, int E, int G, class Accumulator>
__device__ int accumulate_first(const KernelArgs<T>& args, const std::int64_t* row, std::int64_t element, Elements<S, E>& base,
                                Accumulator (&accumulators)[E]) {
  if constexpr (G > 1) {
    if (args.first < G) return accumulate_first<T, S, E, G - 1>(args, row, element, base, accumulators);
  }
  accumulate<T, S, S, E, G, true>(args, row, 0, element, base, accumulators);
  return G;
}

// Accumulates models of one storage type that need not be the base's, up to `end`.
template <class T, class S, class M, int E, class Accumulator>
__device__ void accumulate_mixed(const KernelArgs<T>& args, const std::int64_t* row, int model, int end, std::int64_t element,
                                 Elements<S, E>& base, Accumulator (&accumulators)[E]) {
  for (; model + kGroup <= end; model += kGroup)
    accumulate<T, S, M, E, kGroup, false>(args, row, model, element, base, accumulators);
  for (; model < end; ++model) accumulate<T, S, M, E, 1, false>(args, row, model, element, base, accumulators);
}

// Loads the base, and accumulates all models of a batch: neighbours of one storage type together.
template <class T, class S, bool kSameDtype, int E, class Accumulator>
__device__ void accumulate_all(const KernelArgs<T>& args, const std::int64_t* row, std::int64_t element, Elements<S, E>& base,
                               Accumulator (&accumulators)[E]) {
  if constexpr (kSameDtype) {
    for (int k = accumulate_first<T, S, E, kGroup>(args, row, element, base, accumulators); k < args.models; k += kGroup)
      accumulate<T, S, S, E, kGroup, false>(args, row, k, element, base, accumulators);
  } else {
    base = load_base<S, E>(row, element);
    const Table<T> table{args};
    for (int k = 0, end; k < args.models; k = end) {
      const Dtype dtype = table.type(k);
      if (args.one_type) end = args.models;
      else for (end = k + 1; end < args.models && table.type(end) == dtype;) ++end;
      switch (dtype) {
        case kF64:
          if constexpr (sizeof(T) == 8) accumulate_mixed<T, S, F64, E>(args, row, k, end, element, base, accumulators);
          break;
        case kF32: accumulate_mixed<T, S, F32, E>(args, row, k, end, element, base, accumulators); break;
        case kF16: accumulate_mixed<T, S, F16, E>(args, row, k, end, element, base, accumulators); break;
        case kBF16: accumulate_mixed<T, S, BF16, E>(args, row, k, end, element, base, accumulators); break;
      }
    }
  }
}

// count += condition in one instruction, where the compiler would take two.
__device__ void add_if(int& count, bool condition) {
#ifdef __CUDA_ARCH__
  asm("{ .reg .pred p; setp.ne.s32 p, %1, 0; @p add.s32 %0, %0, 1; }" : "+r"(count) : "r"(static_cast<int>(condition)));
#else
  count += condition;
#endif
}

// Merges and counts elements of a segment, if their sums and results show that b and every d_k is finite. Otherwise returns
// false, and has done nothing.
template <class T, class S, bool kSameDtype, class Accumulator, int E>
__device__ bool merge_quickly(const KernelArgs<T>& args, const std::int64_t* row, std::int64_t element, Counts& counts) {
  using Float = typename S::Float;
  Elements<S, E> base;
  Accumulator accumulators[E];
  accumulate_all<T, S, kSameDtype, E>(args, row, element, base, accumulators);
  Float merged[E];
  bool sure = true;
  int agreed = counts.agreed, vetoed = counts.vetoed;
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const auto& accumulator = accumulators[e];
    const T b = widen<T>(base, e);
    T mean;
    if constexpr (Accumulator::kResultTells) mean = quick_quotient(accumulator.sum, args.constants.n, args.reciprocal);
    else mean = accumulator.mean(args.constants);
    const auto result = static_cast<Float>(negated_mean(b, mean, args.constants));
    const bool agree = accumulator.agree(args.constants);
    merged[e] = agree ? result : static_cast<Float>(b);
    // A majority without one has no mean, and one with one does not tell of the others.
    if constexpr (Accumulator::kResultTells) sure &= in_range<S>(result);
    else sure &= in_range<S>(merged[e]) & in_range<F64>(accumulator.sum);
    add_if(agreed, agree);
    add_if(vetoed, accumulator.vetoed_by_zero(args.constants));
  }
  if (!sure) return false;
  counts.agreed = agreed;
  counts.vetoed = vetoed;
  if (row[2]) store(global(row[2]) + element * sizeof(typename S::Bits), rounded<S>(merged));
  return true;
}

// An element of storage type M at any address, less what d_k subtracts.
template <class T, class S, class M>
__device__ T difference(const char* address, std::int64_t element, T base, const KernelArgs<T>& args) {
  const T x = widen<T, M>(load_anywhere<typename M::Bits>(address + element * sizeof(typename M::Bits)));
  return args.subtracted ? x - origin<T, S, M>(base) : x;
}

// Merges and counts elements one by one: from one up to `stop`, each `step` further.
template <class T, class S, class Accumulator>
__device__ __noinline__ Counts merge_one_by_one(const KernelArgs<T>& args, const std::int64_t* row, std::int64_t element,
                                                std::int64_t stop, int step) {
  const Table<T> table{args};
  Counts counts;
  for (; element < stop; element += step) {
    const std::int64_t offset = element * sizeof(typename S::Bits);
    const auto base = row[1] ? load_anywhere<typename S::Bits>(global(row[1]) + offset) : typename S::Bits{};
    const T b = widen<T, S>(base);
    Accumulator accumulator;
    for (int k = 0; k < args.models; ++k) {
      const char* const address = global(row[3 + k]);
      T d;
      switch (table.type(k)) {
        case kF64: d = difference<T, S, F64>(address, element, b, args); break;
        case kF32: d = difference<T, S, F32>(address, element, b, args); break;
        case kF16: d = difference<T, S, F16>(address, element, b, args); break;
        case kBF16: d = difference<T, S, BF16>(address, element, b, args); break;
      }
      accumulator.accumulate(d);
    }
    const auto outcome = finish<S>(base, accumulator, args.constants);
    counts.agreed += outcome.agreed;
    counts.nonfinite += !outcome.finite;
    counts.vetoed += outcome.vetoed;
    if (row[2]) store_anywhere(global(row[2]) + offset, outcome.bits);
  }
  return counts;
}

__device__ void add(Counts& counts, const Counts& more) {
  counts.agreed += more.agreed;
  counts.nonfinite += more.nonfinite;
  counts.vetoed += more.vetoed;
}

// kSameDtype: the models are stored as the base is. Mixed types and the running values of a majority need more registers.
template <class T, class S, bool kSameDtype, template <class, class> class Accumulator>
__global__ void __launch_bounds__(kThreads, kSameDtype && Accumulator<T, T>::kResultTells ? kBlocks : 2)
    merge_tiles(const __grid_constant__ KernelArgs<T> args) {
  constexpr int E = kElements<T, S>;
  static_assert(kCudaTile % 16 == 0 && kCudaTile % E == 0, "a tile begins where a thread may load");
  const Table<T> table{args};
  int tile = static_cast<int>(std::uint64_t{blockIdx.x} * args.tiles / gridDim.x);
  const int end = static_cast<int>((std::uint64_t{blockIdx.x} + 1) * args.tiles / gridDim.x);
  int segment = segment_of(args.segments, tile, [&](int i) { return *table.tiling(i); });
  while (tile < end) {
    const std::int64_t* const tiling = table.tiling(segment);
    const int first = static_cast<int>(tiling[0]), next = static_cast<int>(tiling[2]);
    const int last = next < end ? next : end;
    const std::int64_t* row = table.row(segment);
    Counts counts;
    const std::int64_t whole = std::int64_t{last - first} * kCudaTile, stop = whole < row[0] ? whole : row[0];
    std::int64_t element = std::int64_t{tile - first} * kCudaTile;
    if (tiling[1]) {
      for (std::int64_t own = element + threadIdx.x * E; own + E <= stop; own += kThreads * E)
        if (!merge_quickly<T, S, kSameDtype, Accumulator<T, T>, E>(args, row, own, counts))
          add(counts, merge_one_by_one<T, S, Accumulator<T, T>>(args, row, own, own + E, 1));
      element = stop - stop % E;
    }
    if (element + threadIdx.x < stop)
      add(counts, merge_one_by_one<T, S, Accumulator<T, T>>(args, row, element + threadIdx.x, stop, kThreads));
    std::int64_t* to = args.counts + kCounted * std::int64_t{segment};
    add_for_warp(to, counts.agreed);
    add_for_warp(to + 1, counts.nonfinite);
    add_for_warp(to + 2, counts.vetoed);
    tile = last;
    ++segment;
  }
}

}  // namespace
}  // namespace negmerge
