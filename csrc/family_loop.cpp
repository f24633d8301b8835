// The rule of the other methods (family.h) over consecutive elements, on one thread. Compiled once for each instruction set.
//
// A tile of a segment is merged in steps, whose values stay in the first-level cache. The models are swept in groups, as merge_loop.cpp
// has them: the values of a pack of elements stay in registers over a group, and in memory between groups. What a sweep does not take as
// it is stored is made differences in the arithmetic type first: models in float64 arithmetic that are not F64, elements of which there
// are too few for a step, and what a random gate lets pass. Then the totals are reduced. Then weights and λ are applied, and results are
// rounded and stored. Elements that may not be finite are merged again one by one.
//
// A sweep is compiled for the type of its models, for what is tallied, and for whether there are gates or factors. The steps after it
// are compiled for fewer choices, as they are for all models at once.
//
// What is usual, a few models stored as the base is, has loops of its own that do all of this for two packs at a time (merge_packs).
#include <limits>
#include <type_traits>

#include "dtypes.h"
#include "family.h"
#include "merge_loop.h"
#include "packs.h"

// As in merge_loop.cpp.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-reassoc", "no-tree-ter")
#endif

#include "loop_parts.h"

namespace negmerge {
namespace {

constexpr int kTileBytes = 4096;  // of the arithmetic type
constexpr int kGroup = 8;         // models at once
constexpr int kMaxPacks = 4;      // of a step
constexpr int kMaxState = 11;     // fields of a totals

template <class T>
struct Pack : Lanes<T> {
  static constexpr int step = kMaxPacks * Lanes<T>::lanes;
  static constexpr int tile = kTileBytes / sizeof(T);
};
template <class T>
using PackOf = typename Lanes<T>::N;

alignas(64) constexpr char kZeros[kPackBytes] = {};

// Numbers of storage type M, as a pack of T.
template <class T, class M>
NEGMERGE_INLINE PackOf<T> load(const char* from) {
  using L = Lanes<T>;
  using F = typename L::template Of<typename M::Float>;
  using Word = typename L::template Of<typename M::Word>;
  using Bits = typename L::template Of<typename M::Bits>;
  return convert<PackOf<T>>(load_floats<M, F, Word, Bits>(from));
}

// Packs of T, one after the other. step: bytes from one to the next; 0 if it is the same one.
struct PackStream {
  const char* at;
  std::int64_t step;

  template <class T>
  NEGMERGE_INLINE PackOf<T> pack(int i) const {
    return read<PackOf<T>>(at + i * step);
  }
};

// The numbers of a group of models.
template <class T>
struct Numbers {
  T factor[kGroup], vote[kGroup], low[kGroup], high[kGroup];
};

// A group of models over packs of a tile.
template <class T>
struct Group {
  const char* x[kGroup];
  int count;
  Numbers<T> numbers;
  PackStream minus;  // what d_k subtracts
  bool first;
  int packs;
  char* states;         // of all packs
  T *reduced, *totals;  // totals: null but for masks
};

// What is done before the totals: nothing; small differences are dropped; there are any factors, bounds and votes. In the first two cases
// factors and votes are 1, and the totals tells of all that is not finite.
enum Gating { kNoGating, kLowGating, kFullGating };

// kTotalSigns, where all votes are 1.
template <class T, class N>
struct SignsTally {
  using Mask = typename Lanes<T>::Mask;
  N total = N{}, positive = N{}, negative = N{};
  Mask n_positive = {}, n_negative = {};

  NEGMERGE_INLINE void accumulate(N e, N) {
    const N zero = N{};
    const Mask up = e > zero, down = e < zero;
    total = total + e;
    positive = positive + (up ? e : zero);
    negative = negative + (down ? e : zero);
    n_positive -= up;
    n_negative -= down;
  }
  NEGMERGE_INLINE N reduced(Election, Reduction reduction, const FamilyConstants<T>&) const {
    const Mask up = total >= N{};
    const N sum = up ? positive : negative, votes = convert<N>(up ? n_positive : n_negative);
    return reduction == kMean ? (votes == N{} ? N{} : sum / votes) : sum;
  }
  NEGMERGE_INLINE Mask vetoed_by_zero(const FamilyConstants<T>&) const { return Mask{}; }
};

// What is kept of a pack of elements. check: the sum of all p_k, where not all of them are added to the totals.
template <class A, class N, bool kFull>
struct State {
  A totals;
  N check = N{};

  NEGMERGE_INLINE N checked() const { return check; }
};
template <class A, class N>
struct State<A, N, false> {
  A totals;

  NEGMERGE_INLINE N checked() const { return totals.total; }
};

template <class A>
constexpr bool kIsMasks = false;
template <class T, class N>
constexpr bool kIsMasks<MaskTotals<T, N>> = true;

// Packs that are accumulated at once: there are 16 registers, or 32.
template <class A, class N>
constexpr int packs_at_once() {
  constexpr int values = sizeof(A) / sizeof(N);
  return values <= 2 ? 4 : kPackBytes == 64 || values <= 3 ? 2 : 1;
}

// A number in all lanes: 0 + x would not be x where it is -0, as far as the compiler knows.
template <class T>
NEGMERGE_INLINE PackOf<T> splat(T x) {
  return x - PackOf<T>{};
}

// Accumulates a group of models of type X.
template <class T, class X, class A, Gating kGating>
__attribute__((noinline)) void sweep(const Group<T>& group, const FamilyConstants<T>& constants) {
  using N = PackOf<T>;
  using Kept = State<A, N, kGating == kFullGating>;
  constexpr int kPacks = packs_at_once<A, N>();
  constexpr std::int64_t bytes = Lanes<T>::lanes * sizeof(typename X::Bits);
  const char* x[kGroup];
  for (int k = 0; k < group.count; ++k) x[k] = group.x[k];
  [[maybe_unused]] const FamilyConstants<T> c = constants;
  const Numbers<T>& numbers = group.numbers;
  const int count = group.count, packs = group.packs;
  const bool first = group.first;
  const char* from = group.minus.at;
  const std::int64_t from_step = group.minus.step;
  auto* states = reinterpret_cast<Kept*>(group.states);
  for (int at = 0; at < packs; at += kPacks, from += kPacks * from_step) {
    Kept s[kPacks];
    N minus[kPacks];
#pragma GCC unroll 4
    for (int j = 0; j < kPacks; ++j) {
      minus[j] = read<N>(from + j * from_step);
      if (!first) s[j] = states[at + j];
      else if constexpr (kIsMasks<A>) s[j].totals.total = read<N>(reinterpret_cast<const char*>(group.totals) + (at + j) * kPackBytes);
    }
    const std::int64_t offset = at * bytes;
#pragma GCC unroll 1
    for (int k = 0; k < count; ++k) {
      const char* operand = x[k] + offset;
#pragma GCC unroll 4
      for (int j = 0; j < kPacks; ++j) {
        const N d = load<T, X>(operand + j * bytes) - minus[j];
        N e = d;
        // Not "at least": what is not a number passes.
        if constexpr (kGating == kLowGating) e = magnitude(d) < splat(numbers.low[k]) ? N{} : d;
        if constexpr (kGating == kFullGating) {
          const N p = splat(numbers.factor[k]) * d, size = magnitude(d);
          s[j].check = s[j].check + p;
          e = ((size >= splat(numbers.low[k])) & (size <= splat(numbers.high[k]))) ? p : N{};
        }
        if constexpr (kIsMasks<A>) s[j].totals.accumulate(e, c);
        else s[j].totals.accumulate(e, splat(numbers.vote[k]));
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kPacks; ++j) states[at + j] = s[j];
  }
}

// Reduces what all groups have accumulated by an election and a reduction. What is not surely finite is reduced to NaN, and what is vetoed
// by zero to -0.
template <class T, class A, bool kFull>
NEGMERGE_INLINE void reduce_packs(const Group<T>& group, const FamilyConstants<T>& c, Election election, Reduction reduction) {
  using N = PackOf<T>;
  const N zero = N{}, nan = splat(T(__builtin_nan("")));
  const auto* states = reinterpret_cast<const State<A, N, kFull>*>(group.states);
  auto* to = reinterpret_cast<char*>(group.reduced);
  for (int at = 0; at < group.packs; ++at, to += kPackBytes) {
    const A& totals = states[at].totals;
    const N check = states[at].checked();
    N r;
    if constexpr (kIsMasks<A>) r = totals.reduced(read<N>(to));
    else r = totals.reduced(election, reduction, c);
    if constexpr (!kIsMasks<A>)
      if (election == kAgreement) r = totals.vetoed_by_zero(c) ? -zero : r;
    r = check - check == zero ? r : nan;
    memcpy(to, &r, sizeof r);
  }
}
template <class T, class A, bool kFull>
__attribute__((noinline)) void reduce(const Group<T>& group, const FamilyConstants<T>& constants, Election election,
                                      Reduction reduction) {
  const FamilyConstants<T> c = constants;
  if constexpr (!kIsMasks<A>)
    if (group.totals)
      for (int at = 0; at < group.packs; ++at)
        memcpy(reinterpret_cast<char*>(group.totals) + at * kPackBytes,
               &reinterpret_cast<const State<A, PackOf<T>, kFull>*>(group.states)[at].totals.total, kPackBytes);
  // The usual ones have loops of their own.
  if (election == kAll && reduction == kMean && c.votes != T(0)) return reduce_packs<T, A, kFull>(group, c, kAll, kMean);
  if (election == kAll && reduction == kLargest) return reduce_packs<T, A, kFull>(group, c, kAll, kLargest);
  if (election == kSignOfSum && reduction == kMean) return reduce_packs<T, A, kFull>(group, c, kSignOfSum, kMean);
  reduce_packs<T, A, kFull>(group, c, election, reduction);
}

// What is done for a totals.
template <class T>
struct Steps {
  void (*sweep)(const Group<T>&, const FamilyConstants<T>&);
  void (*reduce)(const Group<T>&, const FamilyConstants<T>&, Election, Reduction);
};
template <class T, class X, Gating kGating, class A>
constexpr Steps<T> kSteps{sweep<T, X, A, kGating>, reduce<T, A, kGating == kFullGating>};

// The steps for a totals, a sum of bits of Totalled; kTotalMasks is that of the masks.
constexpr int kTotalMasks = -1;
template <class T, class X, Gating kGating>
const Steps<T>& steps_of(int tallied) {
  using N = PackOf<T>;
  if constexpr (kGating != kFullGating)
    if (tallied == kTotalSigns) return kSteps<T, X, kGating, SignsTally<T, N>>;
  switch (tallied) {
    case kTotalSum: return kSteps<T, X, kGating, Totals<T, N, kTotalSum>>;
    case kTotalLargest: return kSteps<T, X, kGating, Totals<T, N, kTotalLargest>>;
    case kTotalSigns: return kSteps<T, X, kGating, Totals<T, N, kTotalSigns>>;
    case kTotalExtremes: return kSteps<T, X, kGating, Totals<T, N, kTotalExtremes>>;
    case kTotalCounts: return kSteps<T, X, kGating, Totals<T, N, kTotalCounts>>;
    case kTotalMasks: return kSteps<T, X, kGating, MaskTotals<T, N>>;
    default: return kSteps<T, X, kGating, Totals<T, N, kTotalAll>>;  // what no method of the catalogue needs
  }
}

// Whether models of a type are swept as they are stored.
template <class T>
bool is_swept(Dtype dtype) {
  return sizeof(T) == 8 ? dtype == kF64 : dtype != kF64;
}
template <class T, class X>
const Steps<T>& steps_of(Gating gating, int tallied) {
  if (gating == kLowGating && tallied == kTotalSigns) return kSteps<T, X, kLowGating, SignsTally<T, PackOf<T>>>;  // TIES
  return gating == kNoGating ? steps_of<T, X, kNoGating>(tallied) : steps_of<T, X, kFullGating>(tallied);
}
template <class T>
const Steps<T>& steps_of(Gating gating, Dtype dtype, int tallied) {
  if constexpr (sizeof(T) == 8) return steps_of<T, F64>(gating, tallied);
  else {
    if (dtype == kF16) return steps_of<T, F16>(gating, tallied);
    if (dtype == kBF16) return steps_of<T, BF16>(gating, tallied);
    return steps_of<T, F32>(gating, tallied);
  }
}

// Numbers of storage type M, or integers, as numbers of T. Behind the last one, zeros to the end of a step.
template <class T, class M>
void widen(const char* from, int count, T* to) {
  using N = PackOf<T>;
  constexpr int lanes = Lanes<T>::lanes;
  int i = 0;
  if constexpr (sizeof(typename M::Float) <= sizeof(T))
    for (; i + lanes <= count; i += lanes) {
      const N x = load<T, M>(from + i * sizeof(typename M::Bits));
      memcpy(to + i, &x, sizeof x);
    }
  for (; i < count; ++i)
    to[i] = static_cast<T>(M::template widen<typename M::Float>(
        static_cast<typename M::Word>(read<typename M::Bits>(from + i * sizeof(typename M::Bits)))));
  for (; i % Pack<T>::step; ++i) to[i] = T(0);
}
template <class T, class Integer>
void widen_integers(const char* from, int count, T* to) {
  int i = 0;
  for (; i < count; ++i) to[i] = static_cast<T>(read<Integer>(from + i * sizeof(Integer)));
  for (; i % Pack<T>::step; ++i) to[i] = T(0);
}
template <class T>
void widen(int type, const char* from, int count, T* to) {
  switch (type) {
    case kWeightU8: return widen_integers<T, unsigned char>(from, count, to);
    case kWeightI32: return widen_integers<T, std::int32_t>(from, count, to);
    case kWeightI64: return widen_integers<T, std::int64_t>(from, count, to);
  }
  with_type<double>(static_cast<Dtype>(type), [&](auto stored) { widen<T, decltype(stored)>(from, count, to); });
}
template <class T>
T weight_one(int type, const char* from) {
  switch (type) {
    case kWeightU8: return static_cast<T>(read<unsigned char>(from));
    case kWeightI32: return static_cast<T>(read<std::int32_t>(from));
    case kWeightI64: return static_cast<T>(read<std::int64_t>(from));
  }
  return load_one<T>(static_cast<Dtype>(type), from);
}

// Products of the lower halves of numbers, and a number.
using Longs = Lanes<double>::Of<std::uint64_t>;
NEGMERGE_INLINE Longs product(Longs x, std::uint32_t by) {
#if defined(__AVX512F__)
  return (Longs)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(by));
#elif defined(__AVX2__)
  return (Longs)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(by));
#elif defined(__SSE2__)
  return (Longs)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(by));
#else
  return (x & 0xffffffffu) * by;
#endif
}

// philox of `blocks` blocks from one on, or of a few more. Upper halves of a, b, c and d mean nothing until the end.
void philox_blocks(std::uint64_t seed, std::uint64_t block, int blocks, std::uint32_t tensor, std::uint32_t model, std::uint32_t* to) {
  constexpr int lanes = sizeof(Longs) / 8;
  Longs blocks_now{};
  for (int lane = 0; lane < lanes; ++lane) blocks_now[lane] = block + lane;
  for (int i = 0; i < blocks; i += lanes, blocks_now += lanes, to += 4 * lanes) {
    Longs a = blocks_now, b = a >> 32, c = Longs{} + tensor, d = Longs{} + model;
    auto low = static_cast<std::uint32_t>(seed), high = static_cast<std::uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u) {
      const Longs first = product(a, 0xD2511F53u), second = product(c, 0xCD9E8D57u);
      a = (second >> 32) ^ b ^ low;
      b = second;
      c = (first >> 32) ^ d ^ high;
      d = first;
    }
    const Longs halves[] = {(a & 0xffffffffu) | b << 32, (c & 0xffffffffu) | d << 32};
    std::uint64_t front[lanes], back[lanes];
    memcpy(front, &halves[0], sizeof front);
    memcpy(back, &halves[1], sizeof back);
    for (int lane = 0; lane < lanes; ++lane) {
      const std::uint64_t both[] = {front[lane], back[lane]};
      memcpy(to + 4 * lane, both, sizeof both);
    }
  }
}

struct FamilyCounts {
  std::int64_t agreed = 0, nonfinite = 0, vetoed = 0, masked = 0;

  template <class Bits>
  void add(const FamilyOutcome<Bits>& outcome) {
    agreed += outcome.agreed;
    nonfinite += !outcome.finite;
    vetoed += outcome.vetoed;
    masked += outcome.masked;
  }
  // Adds to the counts of a segment, and starts again. shared: other threads may do so, too.
  void flush(std::int64_t* to, bool shared) {
    const std::int64_t found[kFamilyCounted] = {agreed, nonfinite, vetoed, masked};
    for (int i = 0; i < kFamilyCounted; ++i) {
      if (!shared) to[i] += found[i];
      else if (found[i]) __atomic_fetch_add(to + i, found[i], __ATOMIC_RELAXED);
    }
    *this = {};
  }
};

// Results of whole steps: of bases b and of r, both in the arithmetic type. weights: null if there are none.
template <class T>
struct Results {
  PackStream base;
  const T *reduced, *weights;
  char* out;  // null: nothing is stored
  bool past_cache, counts_vetoed;
};

// Rounds to type O and stores two packs.
template <class O, class F>
NEGMERGE_INLINE void store_two(char* to, const F (&x)[2], bool past_cache) {
  constexpr int lanes = sizeof(F) / sizeof(typename O::Float);
  using Word = typename Vector<typename O::Word, lanes>::type;
  using Bits = typename Vector<typename O::Bits, lanes>::type;
  const Bits bits[] = {rounded_bits<O, Bits, Word>(x[0]), rounded_bits<O, Bits, Word>(x[1])};
#ifdef __AVX2__
  if constexpr (sizeof(Bits) == 16) return store(to, _mm256_set_m128i((__m128i)bits[1], (__m128i)bits[0]), past_cache);
#endif
  for (int j = 0; j < 2; ++j) store(to + j * sizeof(Bits), bits[j], past_cache);
}

// What is counted of packs, by lanes.
template <class T>
struct PackCounts {
  using Mask = typename Lanes<T>::Mask;
  Mask agreed{}, vetoed{}, masked{};

  void add_to(FamilyCounts& counts, bool counts_vetoed) const {
    for (int lane = 0; lane < Lanes<T>::lanes; ++lane) {
      counts.agreed += agreed[lane];
      counts.masked += masked[lane];
      if (counts_vetoed) counts.vetoed += vetoed[lane];
    }
  }
};

// Finishes two packs, the first of which is pack `at` of the results. O: the output's type. Returns false, and does nothing, if anything may
// not be finite.
template <class T, class O, bool kConsensus>
NEGMERGE_INLINE bool finish_two(const Results<T>& results, T scale, int at, const PackOf<T> (&b)[2], const PackOf<T> (&r)[2],
                                PackCounts<T>& counts) {
  using N = PackOf<T>;
  using Mask = typename Lanes<T>::Mask;
  using F = typename Lanes<T>::template Of<typename O::Float>;
  using FMask = decltype(F{} < F{});
  constexpr std::int64_t bytes = Lanes<T>::lanes * sizeof(typename O::Bits);
  const N zero = N{};
  F result[2];
  FMask sure = FMask{} == FMask{};
  Mask chosen[2], veto[2], mask[2] = {};
  for (int j = 0; j < 2; ++j) {
    N weighted = r[j];
    if (results.weights) {
      const N w = read<N>(reinterpret_cast<const char*>(results.weights) + (at + j) * kPackBytes);
      weighted = w * r[j];
      mask[j] = (w == zero) & (r[j] != zero);
    }
    chosen[j] = weighted != zero;
    veto[j] = (r[j] == zero) & ((Mask)r[j] < Mask{});
    if constexpr (kConsensus) {
      result[j] = convert<F>(chosen[j] ? weighted : zero);
      sure &= in_range<O>(result[j] + convert<F>(b[j] - b[j]));
    } else {
      result[j] = convert<FMask>(chosen[j]) ? convert<F>(b[j] - scale * weighted) : convert<F>(b[j]);
      sure &= in_range<O>(result[j]);
    }
  }
  if (__builtin_expect(!all_negative(sure), 0)) return false;
  for (int j = 0; j < 2; ++j) {
    counts.agreed -= chosen[j];
    counts.vetoed -= veto[j];
    counts.masked -= mask[j];
  }
  if (results.out) store_two<O>(results.out + at * bytes, result, results.past_cache);
  return true;
}

// Finishes packs from `at` on. Returns where it stopped: at the end, or at two of which anything may not be finite.
template <class T, class O, bool kConsensus>
__attribute__((noinline)) int finish_packs(const Results<T>& results, T scale, int at, int packs, FamilyCounts& counts) {
  using N = PackOf<T>;
  const PackStream reduced{reinterpret_cast<const char*>(results.reduced), kPackBytes};
  PackCounts<T> found;
  for (; at < packs; at += 2) {
    const N b[] = {results.base.template pack<T>(at), results.base.template pack<T>(at + 1)};
    const N r[] = {reduced.template pack<T>(at), reduced.template pack<T>(at + 1)};
    if (!finish_two<T, O, kConsensus>(results, scale, at, b, r, found)) break;
  }
  found.add_to(counts, results.counts_vetoed);
  return at;
}

// The same from the loads on, of all models in one group: what is usual. All of them are stored as the base is, S; results.base and
// group.minus are, too. The values of a pack stay in registers from the first load to the store, and the loads of the next packs are under
// way meanwhile: a tile that is swept, reduced and finished waits for memory before it computes.
template <class T, class S, class A, Gating kGating, Election kElection, Reduction kReduction>
__attribute__((noinline)) int merge_packs(const Group<T>& group, const Results<T>& results, const FamilyConstants<T>& constants, int at,
                                          int packs, FamilyCounts& counts) {
  using N = PackOf<T>;
  constexpr std::int64_t bytes = Lanes<T>::lanes * sizeof(typename S::Bits);
  const char* x[kGroup];
  for (int k = 0; k < group.count; ++k) x[k] = group.x[k];
  const int count = group.count;
  const FamilyConstants<T> c = constants;
  const Results<T> to = results;
  const PackStream minus = group.minus;
  const N zero = N{}, nan = splat(T(__builtin_nan("")));
  PackCounts<T> found;
  for (; at < packs; at += 2) {
    A s[2];
    N from[2], b[2], r[2];
    for (int j = 0; j < 2; ++j) from[j] = load<T, S>(minus.at + (at + j) * minus.step);
#pragma GCC unroll 1
    for (int k = 0; k < count; ++k)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const N d = load<T, S>(x[k] + (at + j) * bytes) - from[j];
        s[j].accumulate(kGating == kLowGating ? (magnitude(d) < splat(group.numbers.low[k]) ? zero : d) : d, splat(T(1)));
      }
    for (int j = 0; j < 2; ++j) {
      b[j] = load<T, S>(to.base.at + (at + j) * to.base.step);
      r[j] = s[j].reduced(kElection, kReduction, c);
      if (kElection == kAgreement) r[j] = s[j].vetoed_by_zero(c) ? -zero : r[j];
      r[j] = s[j].total - s[j].total == zero ? r[j] : nan;
    }
    if (!finish_two<T, S, false>(to, c.scale, at, b, r, found)) break;
  }
  found.add_to(counts, results.counts_vetoed);
  return at;
}

template <class T>
using MergePacks = int (*)(const Group<T>&, const Results<T>&, const FamilyConstants<T>&, int, int, FamilyCounts&);

// merge_packs for what is usual; null for all else.
template <class T, class S>
MergePacks<T> merge_packs_of(Gating gating, Election election, Reduction reduction, int tallied) {
  using N = PackOf<T>;
  if (election == kSignOfSum && reduction == kMean && gating != kFullGating)
    return gating == kLowGating ? merge_packs<T, S, SignsTally<T, N>, kLowGating, kSignOfSum, kMean>
                                : merge_packs<T, S, SignsTally<T, N>, kNoGating, kSignOfSum, kMean>;
  if (gating != kNoGating) return nullptr;
  if (election == kAll && reduction == kSum) return merge_packs<T, S, Totals<T, N, kTotalSum>, kNoGating, kAll, kSum>;
  if (election == kAll && reduction == kMean) return merge_packs<T, S, Totals<T, N, kTotalSum>, kNoGating, kAll, kMean>;
  if (election == kAll) return merge_packs<T, S, Totals<T, N, kTotalLargest>, kNoGating, kAll, kLargest>;
  if (election == kSignOfSum && reduction == kLargest)
    return merge_packs<T, S, Totals<T, N, kTotalExtremes>, kNoGating, kSignOfSum, kLargest>;
  if (election == kAgreement && reduction == kMean && tallied == kTotalExtremes)
    return merge_packs<T, S, Totals<T, N, kTotalExtremes>, kNoGating, kAgreement, kMean>;
  return nullptr;
}

// Merges a range of a batch. S: the storage type of base and output; kConsensus: only to w · r.
template <class T, class S, bool kConsensus>
class FamilyRange {
 public:
  FamilyRange(const Batch& batch, Position position, std::int64_t elements, bool in_cache)
      : batch_(batch), family_(*batch.family), constants_(family_constants<T>(batch)), position_(position), elements_(elements),
        in_cache_(in_cache), unit_(are_ones(batch)), same_(is_one_group(batch)), tallied_(totals_of(family_.election, family_.reduction, batch.required == batch.n)) {}

  void merge() {
    std::int64_t begin = position_.start;  // of this range, in the tile's segment
    for (Tile tile = next_tile(); tile.row;) {
      const Tile next = next_tile();
      merge_tile(tile);
      if (next.row != tile.row) {
        counts_.flush(batch_.counts + kFamilyCounted * tile.segment, begin || tile.start + tile.count < tile.row[0]);
        begin = 0;
      }
      tile = next;
    }
#ifdef __AVX2__
    _mm_sfence();  // what was stored past the cache is visible to the thread that waits for this one
#endif
  }

 private:
  using P = Pack<T>;
  using N = PackOf<T>;
  using O = std::conditional_t<!kConsensus, S, std::conditional_t<sizeof(T) == 8, F64, F32>>;  // the output's type

  Tile next_tile() { return take_tile(batch_, position_, elements_, P::tile); }

  // Whether sweeps find factors and votes of 1. Random gates apply factors before.
  static bool are_ones(const Batch& batch) {
    const double* numbers = batch.family->numbers;
    for (std::int64_t k = 0; k < batch.n; ++k)
      if ((batch.family->gate != kRandom && static_cast<T>(numbers[k]) != T(1)) || static_cast<T>(numbers[batch.n + k]) != T(1)) return false;
    return true;
  }

  // Whether all models are a group that is swept as it is stored, in the base's type.
  static bool is_one_group(const Batch& batch) {
    bool same = batch.n <= kGroup && batch.family->gate != kRandom;
    for (std::int64_t k = 0; same && k < batch.n; ++k) same = batch.dtypes[k] == batch.result;
    return same;
  }

  // terms_: of the tile.
  Gating gating() const {
    if (!unit_ || family_.gate == kMagnitude) {
      for (std::int64_t k = 0; k < batch_.n; ++k)
        if (!unit_ || static_cast<T>(terms_.high(k)) <= std::numeric_limits<T>::max()) return kFullGating;
      return kLowGating;
    }
    return kNoGating;
  }

  void merge_tile(const Tile& tile) {
    const int rest = tile.count % P::step, whole = tile.count - rest;
    terms_ = terms_of(batch_, tile.segment);
    gating_ = gating();
    if (whole && !merge_at_once(tile, whole)) {
      reduce(tile, 0, whole);
      const Results<T> results = results_of(tile, base_);
      each_step(tile, whole, [&](int at, int packs) {
        return finish_packs<T, O, kConsensus>(results, constants_.scale, at, packs, counts_);
      });
    }
    if (!rest) return;
    reduce(tile, whole, rest);
    for (int i = 0; i < rest; ++i) {
      const T r = reduced_[i];
      if (r - r == T(0)) finish_one(tile, whole + i, {r, true, family_.election == kAgreement && r == T(0) && std::signbit(r)});
      else merge_one(tile, whole + i);
    }
  }

  // Reduces elements of a tile from `begin` on: whole steps, or fewer than one has.
  void reduce(const Tile& tile, int begin, int elements) {
    prepare(tile, begin, elements);
    const bool masks = family_.election == kMasks;
    sweep_models(tile, begin, elements, tallied_, masks ? totals_ : nullptr);
    if (masks) sweep_models(tile, begin, elements, kTotalMasks, totals_);
    if (family_.gate == kRandom)
      for (int i = 0; i < elements; ++i) reduced_[i] = check_[i] - check_[i] == T(0) ? reduced_[i] : T(__builtin_nan(""));
  }

  // The base and the weights of what is reduced.
  void prepare(const Tile& tile, int begin, int elements) {
    const char* base = tile.base(batch_);
    if (base) base += begin * static_cast<std::int64_t>(sizeof(typename S::Bits));
    if (!base) base_ = kNothing;
    else if (std::is_same_v<S, Stored> && elements % P::step == 0) base_ = {base, kPackBytes};
    else {
      widen<T, S>(base, elements, widened_);
      base_ = {reinterpret_cast<const char*>(widened_), kPackBytes};
    }
    if (terms_.weights())
      widen<T>(terms_.weight_type(), weight_at(tile, begin), elements, weights_);
    if (family_.gate == kRandom) memset(check_, 0, sizeof check_);
  }

  const char* weight_at(const Tile& tile, int i) const {
    return reinterpret_cast<const char*>(terms_.weights()) + (tile.start + i) * terms_.weight_size();
  }

  // The size of the group from model k on: models of one storage type.
  int group_at(std::int64_t k) const {
    const std::int64_t most = batch_.n - k < kGroup ? batch_.n - k : kGroup;
    int same = 1;
    while (same < most && batch_.dtypes[k + same] == batch_.dtypes[k]) ++same;
    return same;
  }

  void sweep_models(const Tile& tile, int begin, int elements, int tallied, T* totals) {
    Group<T> group;
    group.packs = (elements + P::step - 1) / P::step * kMaxPacks;
    group.states = states_;
    group.reduced = reduced_;
    group.totals = totals;
    for (std::int64_t k = 0; k < batch_.n; k += group.count) {
      const Dtype dtype = batch_.dtypes[k];
      const bool staged = family_.gate == kRandom || !is_swept<T>(dtype) || elements % P::step;
      group.count = group_at(k);
      group.first = k == 0;
      group.minus = subtracted(dtype, group.packs);
      for (int i = 0; i < group.count; ++i) {
        const double* numbers = family_.numbers + k + i;
        const auto factor = static_cast<T>(numbers[0]);
        group.numbers.factor[i] = family_.gate == kRandom ? T(1) : factor;
        group.numbers.vote[i] = static_cast<T>(numbers[batch_.n]);
        group.numbers.low[i] = family_.gate == kMagnitude ? static_cast<T>(terms_.low(k + i)) : T(0);
        group.numbers.high[i] = family_.gate == kMagnitude ? static_cast<T>(terms_.high(k + i)) : std::numeric_limits<T>::infinity();
        group.x[i] = tile.model(batch_, k + i) + begin * kSizes[dtype];
        if (!staged) continue;
        stage(dtype, group.x[i], group.minus, elements, staged_[i]);
        if (family_.gate == kRandom) drop(tile.start + begin, k + i, elements, factor, staged_[i]);
        group.x[i] = reinterpret_cast<const char*>(staged_[i]);
      }
      if (staged) group.minus = kNothing;
      const Steps<T>& steps = steps_of<T>(gating_, staged ? kStored : dtype, tallied);
      steps.sweep(group, constants_);
      if (k + group.count == batch_.n) steps.reduce(group, constants_, family_.election, family_.reduction);
    }
  }

  // What d_k of a model of some type subtracts.
  PackStream subtracted(Dtype dtype, int packs) {
    if (batch_.task_vectors || !base_.step) return kNothing;
    if (holds<S>(dtype)) return base_;
    if (dtype == kF32) round_base<F32>(packs);
    else if (dtype == kF16) round_base<F16>(packs);
    else round_base<BF16>(packs);
    return {reinterpret_cast<const char*>(rounded_), kPackBytes};
  }
  template <class M>
  void round_base(int packs) {
    using F = typename P::template Of<typename M::Float>;
    using Word = typename P::template Of<typename M::Word>;
    for (int i = 0; i < packs; ++i) write(rounded_, i, convert<N>(as_stored<M, Word>(convert<F>(base_.pack<T>(i)))));
  }

  // Differences in the arithmetic type.
  static void stage(Dtype dtype, const char* x, const PackStream& minus, int elements, T* to) {
    widen<T>(dtype, x, elements, to);
    const PackStream from{reinterpret_cast<const char*>(to), kPackBytes};
    for (int i = 0; i * P::lanes < elements; ++i) write(to, i, from.template pack<T>(i) - minus.template pack<T>(i));
  }

  // Applies a random gate to differences. start: of the first one in the segment.
  void drop(std::int64_t start, std::int64_t k, int elements, T factor, T* d) {
    const std::int64_t first = terms_.begin() + start, skipped = first % 4;
    philox_blocks(family_.seed, first / 4, static_cast<int>((skipped + elements + 3) / 4), terms_.key(), static_cast<std::uint32_t>(k),
                  numbers_);
    const auto keep = static_cast<std::uint64_t>(family_.numbers[2 * batch_.n + k]);
    const N factors = splat(keep ? factor : T(0));  // of none kept, all are zero
    const auto last = static_cast<std::uint32_t>(keep ? keep - 1 : 0);
    using Words = typename P::template Of<std::uint32_t>;
    const char *from = reinterpret_cast<const char*>(d), *numbers = reinterpret_cast<const char*>(numbers_ + skipped);
    for (int i = 0; i * P::lanes < elements; ++i) {
      const N p = splat(factor) * read<N>(from + i * kPackBytes);
      write(check_, i, read<N>(reinterpret_cast<const char*>(check_) + i * kPackBytes) + p);
      const auto kept = convert<typename P::Mask>(read<Words>(numbers + i * sizeof(Words)) <= last);
      write(d, i, kept ? factors * read<N>(from + i * kPackBytes) : N{});
    }
  }

  Results<T> results_of(const Tile& tile, const PackStream& base) const {
    char* out = tile.template out<O>();
    const bool past_cache = !in_cache_ && out != tile.base(batch_) && reinterpret_cast<std::uintptr_t>(out) % kPackBytes == 0;
    return {base, reduced_, terms_.weights() ? weights_ : nullptr, out, past_cache, family_.election == kAgreement};
  }

  // Merges the packs of a tile by what returns where it stopped.
  template <class Merge>
  void each_step(const Tile& tile, int elements, const Merge& merge_from) {
    const int packs = elements / P::lanes;
    for (int at = 0; (at = merge_from(at, packs)) < packs; at += 2)
      for (int i = at * P::lanes; i < (at + 2) * P::lanes; ++i) merge_one(tile, i);
  }

  // Merges whole steps without memory for totals, if that is compiled for what is asked.
  bool merge_at_once(const Tile& tile, int elements) {
    if constexpr (kConsensus || sizeof(T) != sizeof(typename S::Float)) {
      return false;
    } else {
      const auto run = same_ ? merge_packs_of<T, S>(gating_, family_.election, family_.reduction, tallied_) : nullptr;
      if (!run) return false;
      if (terms_.weights()) widen<T>(terms_.weight_type(), weight_at(tile, 0), elements, weights_);
      const char* base = tile.base(batch_);
      const PackStream stored = base ? PackStream{base, P::lanes * static_cast<std::int64_t>(sizeof(typename S::Bits))} : kNothing;
      Group<T> group;
      group.count = static_cast<int>(batch_.n);
      group.minus = batch_.task_vectors ? kNothing : stored;
      for (int k = 0; k < group.count; ++k) {
        group.x[k] = tile.model(batch_, k);
        group.numbers.low[k] = static_cast<T>(terms_.low(k));
      }
      const Results<T> results = results_of(tile, stored);
      each_step(tile, elements, [&](int at, int packs) { return run(group, results, constants_, at, packs, counts_); });
      return true;
    }
  }

  // Merges an element that may not be finite.
  __attribute__((noinline)) void merge_one(const Tile& tile, int i) {
    const T b = base_of(tile, i);
    const auto difference = [&](std::int64_t k) {
      const Dtype dtype = batch_.dtypes[k];
      const T x = load_one<T>(dtype, tile.model(batch_, k) + i * kSizes[dtype]);
      return batch_.task_vectors ? x : x - (holds<S>(dtype) ? b : rounded_one(dtype, b));
    };
    finish_one(tile, i, reduce_one<T>(family_, terms_, tile.start + i, constants_, difference));
  }

  typename S::Bits bits_of(const Tile& tile, int i) const {
    const char* base = tile.base(batch_);
    return base ? read<typename S::Bits>(base + i * sizeof(typename S::Bits)) : typename S::Bits{};
  }
  T base_of(const Tile& tile, int i) const {
    return static_cast<T>(S::template widen<typename S::Float>(static_cast<typename S::Word>(bits_of(tile, i))));
  }

  void finish_one(const Tile& tile, int i, Reduced<T> reduced) {
    const T w = terms_.weights() ? weight_one<T>(terms_.weight_type(), weight_at(tile, i)) : T(1);
    FamilyOutcome<typename O::Bits> outcome;
    if constexpr (kConsensus) {
      // Nothing is subtracted from zeros, so that the result is w · r, or +0.
      reduced.finite = reduced.finite && base_of(tile, i) - base_of(tile, i) == T(0);
      outcome = finish_family<O>(typename O::Bits{}, reduced, w, constants_);
    } else {
      outcome = finish_family<O>(bits_of(tile, i), reduced, w, constants_);
    }
    counts_.add(outcome);
    if (char* out = tile.template out<O>()) memcpy(out + i * sizeof outcome.bits, &outcome.bits, sizeof outcome.bits);
  }

  static void write(T* to, int i, N x) { memcpy(to + i * P::lanes, &x, sizeof x); }

  using Stored = std::conditional_t<sizeof(T) == 8, F64, F32>;  // the arithmetic type as it is stored
  static constexpr Dtype kStored = sizeof(T) == 8 ? kF64 : kF32;
  static constexpr PackStream kNothing{kZeros, 0};

  const Batch& batch_;
  const Family& family_;
  const FamilyConstants<T> constants_;
  Position position_;
  std::int64_t elements_;
  const bool in_cache_;
  const bool unit_, same_;
  const int tallied_;
  Gating gating_;
  FamilyCounts counts_;
  SegmentTerms terms_;
  PackStream base_;
  // Tiles: the base, and as models of other types hold it; weights; r, and the sums of all e_k; differences; sums of all p_k.
  alignas(64) T widened_[P::tile], rounded_[P::tile], weights_[P::tile], reduced_[P::tile], totals_[P::tile], staged_[kGroup][P::tile],
      check_[P::tile];
  alignas(64) char states_[kMaxState * kTileBytes];
  alignas(64) std::uint32_t numbers_[P::tile + 4 * kPackBytes / 8 + 4];
};

template <class T, class S>
void merge_range(const Batch& batch, Position from, std::int64_t elements, bool in_cache) {
  if (batch.consensus) FamilyRange<T, S, true>(batch, from, elements, in_cache).merge();
  else FamilyRange<T, S, false>(batch, from, elements, in_cache).merge();
}

template <class T>
void merge_range(const Batch& batch, Position from, std::int64_t elements, bool in_cache) {
  with_type<T>(batch.result, [&](auto type) { merge_range<T, decltype(type)>(batch, from, elements, in_cache); });
}

}  // namespace

void NEGMERGE_FAMILY_LOOP(const Batch& batch, Position from, std::int64_t elements, bool in_cache) {
  is_double(batch) ? merge_range<double>(batch, from, elements, in_cache) : merge_range<float>(batch, from, elements, in_cache);
}

}  // namespace negmerge
