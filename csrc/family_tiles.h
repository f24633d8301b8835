// The CUDA kernel of the other methods: one launch for a batch. family_cuda.cu launches it; family.h has the rule.
//
// Blocks, tiles and segments are those of merge_tiles.h. A thread takes two or four neighbouring elements of the base, and for these
// all models, with the loads of four under way at once; at odd addresses and at the end of a segment one element at a time. Totals
// of common methods have kernels of their own.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <type_traits>

#include "batch.h"
#include "cuda_elements.h"
#include "cuda_memory.h"
#include "dtypes.h"
#include "family.h"
#include "merge_cuda.h"
#include "merge_rule.h"

namespace negmerge {
namespace {

constexpr int kFamilyThreads = 256;  // of a block
constexpr int kFamilyGroup = 4;      // models of the base's type whose loads are under way at once; of another half as many

// What goes along with a launch, as KernelArgs of merge_tiles.h.
template <class T>
struct FamilyArgs {
  const std::int64_t* memory;
  std::int64_t* counts;  // [segments, kFamilyCounted]
  int models, segments, tiles;
  Gate gate;
  Election election;
  Reduction reduction;
  std::uint64_t seed;
  FamilyConstants<T> constants;
  T subtracted;
  std::int64_t table[kCudaTable];
};
static_assert(sizeof(FamilyArgs<double>) <= 4096, "every driver takes so much");

// The table of a batch: pack_family_for_device of negmerge_fast/core/descriptors.py says what it holds.
template <class T>
struct FamilyTable {
  const FamilyArgs<T>& args;
  const std::int64_t* memory = args.memory ? args.memory : args.table;

  // The number of tiles before a segment, and whether all its addresses are multiples of 16.
  __device__ const std::int64_t* tiling(int segment) const { return memory + 2 * std::int64_t{segment}; }
  // Elements of a segment, then the addresses of base, out and the models.
  __device__ const std::int64_t* row(int segment) const {
    return tiling(args.segments + 1) + std::int64_t{segment} * (3 + args.models);
  }
  __device__ Dtype type(int model) const { return reinterpret_cast<const Dtype*>(row(args.segments))[model]; }
  // Factors, votes, and how many of 2^32 numbers keep d_k.
  __device__ const double* numbers() const {
    return reinterpret_cast<const double*>(row(args.segments) + (args.models + 7) / 8);
  }
  __device__ SegmentTerms terms(int segment) const {
    const auto* first = reinterpret_cast<const std::int64_t*>(numbers() + 3 * std::int64_t{args.models});
    return {first + std::int64_t{segment} * (4 + 2 * args.models), args.models};
  }
};

struct FamilyCounts {
  int agreed = 0, nonfinite = 0, vetoed = 0, masked = 0;
};

// A totals of which a kernel is compiled has one election; kTotalAll is for all others.
template <int kTotalled, class T>
__device__ Election election_of(const FamilyArgs<T>& args) {
  if constexpr (kTotalled == kTotalAll) return args.election;
  else return kTotalled == kTotalSigns ? kSignOfSum : kTotalled == kTotalExtremes ? kAgreement : kAll;
}

// Elements of a thread at a time, and blocks that a processor can run at a time: the compiler limits registers.
template <class T, int kTotalled>
constexpr int kFamilyElements = sizeof(T) == 8 || kTotalled == kTotalAll ? 2 : 4;
template <class T>
constexpr int kFamilyBlocks = sizeof(T) == 8 ? 1 : 2;

// Which of E neighbouring elements a random gate keeps, a bit for each. first: the first one's number in its tensor.
template <int E>
__device__ unsigned kept(std::uint64_t seed, std::int64_t first, std::uint32_t key, int model, double keep) {
  const int skipped = static_cast<int>(first & 3);
  const auto limit = static_cast<std::uint64_t>(keep);
  unsigned found = 0;
#pragma unroll 1
  for (int at = 0; at < E + skipped; at += 4) {
    const FourNumbers numbers = philox(seed, (first + at) >> 2, key, static_cast<std::uint32_t>(model));
#pragma unroll
    for (int i = 0; i < 4; ++i) found |= static_cast<unsigned>(numbers.of[i] < limit) << (at + i);
  }
  return found >> skipped;
}

// E neighbouring elements of a storage type: at multiples of 16 bytes, or a single one at any address.
template <class M, int E>
struct Neighbours : Elements<M, E> {};
template <class M>
struct Neighbours<M, 1> {
  typename M::Word word;
};

template <class M, int E>
__device__ Neighbours<M, E> load_neighbours(std::int64_t address, std::int64_t element) {
  const char* const from = global(address) + element * sizeof(typename M::Bits);
  if constexpr (E == 1) return {load_anywhere<typename M::Bits>(from)};
  else return {load<Elements<M, E>>(from)};
}
template <class M, int E>
__device__ typename M::Bits bits_of(const Neighbours<M, E>& found, int e) {
  if constexpr (found.kInWord == 1) return found.words[e];
  else return static_cast<typename M::Bits>(found.words[e / 2] >> 16 * (e % 2));
}
template <class T, class M, int E>
__device__ T number(const Neighbours<M, E>& found, [[maybe_unused]] int e) {
  if constexpr (E == 1) return static_cast<T>(widen<typename M::Float, M>(found.word));
  else return static_cast<T>(widen<typename M::Float, M, E>(found, e));
}

// Calls consume(e, p_k, e_k, v_k) for E elements of a model, given d_k. passing: bits of what a random gate keeps.
template <class T, int E, class Consume>
__device__ void gate(const FamilyArgs<T>& args, const SegmentTerms& terms, int model, const T (&d)[E], unsigned passing,
                     const Consume& consume) {
  const double* const numbers = FamilyTable<T>{args}.numbers();
  const T factor = static_cast<T>(numbers[model]), vote = static_cast<T>(numbers[args.models + model]);
  T low = 0, high = T(__builtin_huge_val());
  if (args.gate == kMagnitude) low = static_cast<T>(terms.low(model)), high = static_cast<T>(terms.high(model));
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const T p = factor * d[e], size = magnitude(d[e]);
    const bool passes = (passing >> e & 1) && low <= size && size <= high;
    consume(e, p, passes ? p : T(0), vote);
  }
}

// Calls consume(e, p_k, e_k, v_k) for E elements of models of storage type M, up to `end`, in their order.
template <class T, class S, class M, int E, class Consume>
__device__ void each_of_type(const FamilyArgs<T>& args, const std::int64_t* row, const SegmentTerms& terms, int model, int end,
                             std::int64_t element, const T (&b)[E], const Consume& consume) {
  const double* const numbers = FamilyTable<T>{args}.numbers();
  constexpr int G = std::is_same_v<M, S> ? kFamilyGroup : kFamilyGroup / 2;
  for (; model < end; model += G) {
    Neighbours<M, E> x[G];
#pragma unroll
    for (int k = 0; k < G; ++k)
      if (model + k < end) x[k] = load_neighbours<M, E>(row[3 + model + k], element);
    unsigned passing = ~0u;  // eight bits for each model
    static_assert(E <= 8 && G <= 4, "bits of a word");
    if (args.gate == kRandom) {
#pragma unroll 1
      for (int k = 0; k < G && model + k < end; ++k) {
        const double keep = numbers[2 * args.models + model + k];
        const unsigned bits = kept<E>(args.seed, terms.begin() + element, terms.key(), model + k, keep);
        passing = (passing & ~(255u << 8 * k)) | (bits & 255u) << 8 * k;
      }
    }
#pragma unroll
    for (int k = 0; k < G; ++k) {
      if (model + k >= end) break;
      T d[E];
#pragma unroll
      for (int e = 0; e < E; ++e) d[e] = number<T>(x[k], e) - (args.subtracted ? origin<T, S, M>(b[e]) : T(0));
      gate<T, E>(args, terms, model + k, d, passing >> 8 * k, consume);
    }
  }
}

// d_k of one element at any address.
template <class T, class S, class M>
__device__ T difference(const FamilyArgs<T>& args, std::int64_t address, std::int64_t element, T b) {
  const T x = number<T>(load_neighbours<M, 1>(address, element), 0);
  return x - (args.subtracted ? origin<T, S, M>(b) : T(0));
}

// The same of all models: neighbours of one storage type together, but a single element without a copy of the code for each type.
template <class T, class S, int E, class Consume>
__device__ void each_model(const FamilyArgs<T>& args, const std::int64_t* row, const SegmentTerms& terms, std::int64_t element,
                           const T (&b)[E], const Consume& consume) {
  const FamilyTable<T> table{args};
  if constexpr (E == 1) {
#pragma unroll 1
    for (int k = 0; k < args.models; ++k) {
      T d[1] = {};
      switch (table.type(k)) {
        case kF64:
          if constexpr (sizeof(T) == 8) d[0] = difference<T, S, F64>(args, row[3 + k], element, b[0]);
          break;
        case kF32: d[0] = difference<T, S, F32>(args, row[3 + k], element, b[0]); break;
        case kF16: d[0] = difference<T, S, F16>(args, row[3 + k], element, b[0]); break;
        case kBF16: d[0] = difference<T, S, BF16>(args, row[3 + k], element, b[0]); break;
      }
      unsigned passing = 1;
      if (args.gate == kRandom)
        passing = kept<1>(args.seed, terms.begin() + element, terms.key(), k, table.numbers()[2 * args.models + k]);
      gate<T, 1>(args, terms, k, d, passing, consume);
    }
  } else {
    for (int k = 0, end; k < args.models; k = end) {
      const Dtype dtype = table.type(k);
      for (end = k + 1; end < args.models && table.type(end) == dtype;) ++end;
      switch (dtype) {
        case kF64:
          if constexpr (sizeof(T) == 8) each_of_type<T, S, F64, E>(args, row, terms, k, end, element, b, consume);
          break;
        case kF32: each_of_type<T, S, F32, E>(args, row, terms, k, end, element, b, consume); break;
        case kF16: each_of_type<T, S, F16, E>(args, row, terms, k, end, element, b, consume); break;
        case kBF16: each_of_type<T, S, BF16, E>(args, row, terms, k, end, element, b, consume); break;
      }
    }
  }
}

// The weights of E elements; they are of a segment that has some.
template <class T, class M, int E>
__device__ void widen_weights(const SegmentTerms& terms, std::int64_t element, T (&w)[E]) {
  const auto found = load_neighbours<M, E>(terms.weights(), element);
#pragma unroll
  for (int e = 0; e < E; ++e) w[e] = number<T>(found, e);
}
template <class T, class Integer, int E>
__device__ void widen_integers(const SegmentTerms& terms, std::int64_t element, T (&w)[E]) {
  using Bits = std::make_unsigned_t<Integer>;
  const char* const from = global(terms.weights()) + element * sizeof(Bits);
#pragma unroll
  for (int e = 0; e < E; ++e) w[e] = static_cast<T>(static_cast<Integer>(load_anywhere<Bits>(from + e * sizeof(Bits))));
}
template <class T, int E>
__device__ void load_weights(const SegmentTerms& terms, std::int64_t element, T (&w)[E]) {
  switch (terms.weight_type()) {
    case kF64: return widen_weights<T, F64>(terms, element, w);
    case kF32: return widen_weights<T, F32>(terms, element, w);
    case kF16: return widen_weights<T, F16>(terms, element, w);
    case kBF16: return widen_weights<T, BF16>(terms, element, w);
    case kWeightU8: return widen_integers<T, unsigned char>(terms, element, w);
    case kWeightI32: return widen_integers<T, std::int32_t>(terms, element, w);
    case kWeightI64: return widen_integers<T, std::int64_t>(terms, element, w);
  }
}

// Writes E elements: results, but the base's bits where one is not finite.
template <class S, int E>
__device__ void store_merged(std::int64_t address, std::int64_t element, const Neighbours<S, E>& base,
                             const typename S::Float (&merged)[E]) {
  using Bits = typename S::Bits;
  char* const to = global(address) + element * sizeof(Bits);
  if constexpr (E == 1) {
    store_anywhere(to, static_cast<Bits>(in_range<S>(merged[0]) ? S::template round<typename S::Word>(merged[0]) : base.word));
  } else {
    typename S::Float finite[E];  // nothing else is rounded
#pragma unroll
    for (int e = 0; e < E; ++e) finite[e] = in_range<S>(merged[e]) ? merged[e] : 0;
    store(to, rounded<S>(finite));
#pragma unroll
    for (int e = 0; e < E; ++e)
      if (!in_range<S>(merged[e])) store(to + e * sizeof(Bits), bits_of(base, e));
  }
}

// Merges and counts E elements of a segment.
template <class T, class S, int kTotalled, int E>
__device__ void merge_elements(const FamilyArgs<T>& args, const std::int64_t* row, const SegmentTerms& terms, std::int64_t element,
                               FamilyCounts& counts) {
  using Float = typename S::Float;
  const Election election = election_of<kTotalled>(args);
  const Reduction reduction = kTotalled == kTotalLargest ? kLargest : args.reduction;
  Neighbours<S, E> base = {};
  if (row[1]) base = load_neighbours<S, E>(row[1], element);
  T b[E], product_of_zero[E] = {}, r[E];  // the second is NaN if some p_k is not finite
#pragma unroll
  for (int e = 0; e < E; ++e) b[e] = number<T>(base, e);
  Totals<T, T, kTotalled> totals[E];
  MaskTotals<T, T> masks[E];
  // Of MASKS, all models again with the sum of all: what is loaded is in a cache then.
#pragma unroll 1
  for (int pass = 0; pass < (election == kMasks ? 2 : 1); ++pass) {
    each_model<T, S, E>(args, row, terms, element, b, [&](int e, T p, T value, T vote) {
      product_of_zero[e] = std::fma(p, T(0), product_of_zero[e]);
      if (pass == 0) totals[e].accumulate(value, vote);
      else masks[e].accumulate(value, args.constants);
    });
#pragma unroll
    for (int e = 0; e < E; ++e) masks[e].total = totals[e].total;
  }
#pragma unroll
  for (int e = 0; e < E; ++e) {
    r[e] = totals[e].reduced(election, reduction, args.constants);
    if (election == kMasks) r[e] = masks[e].reduced(r[e]);
  }
  T w[E];
#pragma unroll
  for (int e = 0; e < E; ++e) w[e] = T(1);
  if (terms.weights()) load_weights<T, E>(terms, element, w);
  Float merged[E];
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const T weighted = w[e] * r[e];
    const bool chosen = weighted != T(0);
    const auto result = static_cast<Float>(negated_mean(b[e], weighted, args.constants));
    const bool finite = product_of_zero[e] == T(0) && b[e] - b[e] == T(0) && weighted - weighted == T(0) &&
                        (!chosen || in_range<S>(result));
    merged[e] = chosen && finite ? result : static_cast<Float>(b[e]);
    counts.agreed += chosen && finite;
    counts.nonfinite += !finite;
    counts.vetoed += finite && election == kAgreement && totals[e].vetoed_by_zero(args.constants);
    counts.masked += finite && r[e] != T(0) && w[e] == T(0);
  }
  if (row[2]) store_merged<S, E>(row[2], element, base, merged);
}

template <class T, class S, int kTotalled>
__global__ void __launch_bounds__(kFamilyThreads, kFamilyBlocks<T>) family_tiles(const __grid_constant__ FamilyArgs<T> args) {
  constexpr int E = kFamilyElements<T, kTotalled>;
  static_assert(kCudaTile % 16 == 0 && kCudaTile % E == 0, "a tile begins where a thread may load");
  const FamilyTable<T> table{args};
  int tile = static_cast<int>(std::uint64_t{blockIdx.x} * args.tiles / gridDim.x);
  const int end = static_cast<int>((std::uint64_t{blockIdx.x} + 1) * args.tiles / gridDim.x);
  int segment = segment_of(args.segments, tile, [&](int i) { return *table.tiling(i); });
  while (tile < end) {
    const std::int64_t* const tiling = table.tiling(segment);
    const int first = static_cast<int>(tiling[0]), next = static_cast<int>(tiling[2]);
    const int last = next < end ? next : end;
    const std::int64_t* row = table.row(segment);
    const SegmentTerms terms = table.terms(segment);
    FamilyCounts counts;
    const std::int64_t whole = std::int64_t{last - first} * kCudaTile, stop = whole < row[0] ? whole : row[0];
    std::int64_t element = std::int64_t{tile - first} * kCudaTile;
    if (tiling[1]) {
      for (std::int64_t own = element + threadIdx.x * E; own + E <= stop; own += kFamilyThreads * E)
        merge_elements<T, S, kTotalled, E>(args, row, terms, own, counts);
      element = stop - stop % E;
    }
    for (element += threadIdx.x; element < stop; element += kFamilyThreads)
      merge_elements<T, S, kTotalled, 1>(args, row, terms, element, counts);
    std::int64_t* to = args.counts + kFamilyCounted * std::int64_t{segment};
    add_for_warp(to, counts.agreed);
    add_for_warp(to + 1, counts.nonfinite);
    add_for_warp(to + 2, counts.vetoed);
    add_for_warp(to + 3, counts.masked);
    tile = last;
    ++segment;
  }
}

}  // namespace
}  // namespace negmerge
