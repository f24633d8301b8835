// The rule over consecutive elements, on one thread. Compiled once for each instruction set (CMakeLists.txt).
//
// The models are taken in groups of up to 8: the hardware reads so many streams well, and their addresses fit the registers. With
// up to 8 models, all values of an element stay in registers from the first load to the store. With more, each group goes over
// a tile, whose accumulators stay in the first-level cache, and the last group finishes it; meanwhile the next group's operands
// are prefetched to the second-level cache. All models at once would touch as many pages, a line at a time. One model at a time
// would move all accumulators for every element. Both are slower: bench/results/loop.jsonl.
#include "merge_loop.h"

#include <type_traits>

#include "dtypes.h"
#include "merge_rule.h"
#include "packs.h"

// The compiler's rearrangements would have all differences of a step alive at once, more than there are registers.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-reassoc", "no-tree-ter")
#endif
#include "loop_parts.h"

// Code for one instruction set must never be linked in place of the same code for another, so that only the loop itself has
// external linkage.
namespace negmerge {
namespace {

// bench/tuning/loop.py compiles others; these won, bench/results/loop.jsonl.
#ifndef NEGMERGE_TILE_BYTES
#define NEGMERGE_TILE_BYTES 4096
#endif
#ifndef NEGMERGE_GROUP
#define NEGMERGE_GROUP 8
#endif
#ifndef NEGMERGE_PREFETCH
#define NEGMERGE_PREFETCH 1
#endif
#ifndef NEGMERGE_PAST_CACHE
#define NEGMERGE_PAST_CACHE 1
#endif
constexpr int kTileBytes = NEGMERGE_TILE_BYTES;  // of one field of the accumulators
constexpr int kLongTile = 1 << 16;               // elements, where no accumulators are kept
constexpr int kGroup = NEGMERGE_GROUP;           // models at once
constexpr int kLine = 64;
constexpr int kPacks = 2;                           // of a step
constexpr int kStepBytes = kPacks * kPackBytes;     // of a step of the arithmetic type

// Packs for one arithmetic type. A step is the elements of two of them.
template <class T>
struct Pack : Lanes<T> {
  static constexpr int step = kPacks * Lanes<T>::lanes;
  static constexpr int tile = kTileBytes / sizeof(T);
};

// Whether the packs of a step are its even and its odd elements, not its halves. Then one load of 16-bit numbers gives both,
// and no number changes its place. All streams must be of one type; F16C converts halves.
template <class S, bool kSame>
constexpr bool kEvenAndOdd = kSame && sizeof(typename S::Bits) == 2
#ifdef __F16C__
                             && !S::kHalf
#endif
    ;

// Pack j of a step of storage type M, as numbers of the arithmetic type.
template <class M, class T, bool kSame>
NEGMERGE_INLINE typename Pack<T>::N load(const char* step, int j) {
  using P = Pack<T>;
  using F = typename P::template Of<typename M::Float>;
  using Word = typename P::template Of<typename M::Word>;
  using Bits = typename P::template Of<typename M::Bits>;
  if constexpr (kEvenAndOdd<M, kSame>) {
    const Word both = read<Word>(step);
    if constexpr (!M::kHalf) return bits_as<F>(j ? both & 0xffff0000u : both << 16);
    else return M::template widen<F>(j ? both >> 16 : both & 0xffffu);
  } else return convert<typename P::N>(load_floats<M, F, Word, Bits>(step + j * sizeof(Bits)));
}

// Pack j of a base of type S, as d_k of models of type M takes it.
template <class T, class S, class M, bool kSame>
NEGMERGE_INLINE typename Pack<T>::N origin(const char* step, int j) {
  const auto b = load<S, T, kSame>(step, j);
  if constexpr (kHolds<M, S>) return b;
  else {
    using F = typename Pack<T>::template Of<typename M::Float>;
    return convert<typename Pack<T>::N>(as_stored<M, typename Pack<T>::template Of<typename M::Word>>(convert<F>(b)));
  }
}

// Even and odd elements, put in order.
#if defined(__AVX512F__)
NEGMERGE_INLINE void interleave(Vector<float, 16>::type (&x)[kPacks]) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const __m512 even = (__m512)x[0], odd = (__m512)x[1];
  x[0] = (Vector<float, 16>::type)_mm512_permutex2var_ps(even, first, odd);
  x[1] = (Vector<float, 16>::type)_mm512_permutex2var_ps(even, second, odd);
}
#elif defined(__AVX2__)
NEGMERGE_INLINE void interleave(Vector<float, 8>::type (&x)[kPacks]) {
  const __m256 low = _mm256_unpacklo_ps((__m256)x[0], (__m256)x[1]), high = _mm256_unpackhi_ps((__m256)x[0], (__m256)x[1]);
  x[0] = (Vector<float, 8>::type)_mm256_permute2f128_ps(low, high, 0x20);
  x[1] = (Vector<float, 8>::type)_mm256_permute2f128_ps(low, high, 0x31);
}
#else
NEGMERGE_INLINE void interleave(Vector<float, 4>::type (&x)[kPacks]) {
  const auto even = x[0], odd = x[1];
  x[0] = Vector<float, 4>::type{even[0], odd[0], even[1], odd[1]};
  x[1] = Vector<float, 4>::type{even[2], odd[2], even[3], odd[3]};
}
#endif

// Rounds to type O and stores the packs of a step, which was loaded as type S: numbers in the range of O.
template <class O, class S, bool kSame, class F>
NEGMERGE_INLINE void store_step(char* to, F (&x)[kPacks], bool past_cache) {
  constexpr int lanes = sizeof(F) / sizeof(typename O::Float);
  using Word = typename Vector<typename O::Word, lanes>::type;
  using Bits = typename Vector<typename O::Bits, lanes>::type;
  if constexpr (kEvenAndOdd<O, kSame>) {
    store(to, O::template round<Word>(x[0]) | O::template round<Word>(x[1]) << 16, past_cache);
  } else {
    if constexpr (kEvenAndOdd<S, kSame>) interleave(x);
    for (int j = 0; j < kPacks; ++j) store(to + j * sizeof(Bits), rounded_bits<O, Bits, Word>(x[j]), past_cache);
  }
}

// How packs of T are compared (OneSign): as integers, where these are compared as fast.
#if defined(__AVX512F__)
template <class T>
constexpr bool kIntegersAreFast = true;
#elif defined(__SSE4_1__) || !defined(__SSE2__)
template <class T>
constexpr bool kIntegersAreFast = sizeof(T) == 4;
#else
template <class T>
constexpr bool kIntegersAreFast = false;
#endif
template <class T>
struct Order {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // AVX2 compares 32-bit integers best: doubles by their upper halves. The lower ones mean nothing, but to `of`.
  static constexpr bool kHalves = sizeof(T) == 8;
  using Ordered = Vector<int, 8>::type;
  using Mask = typename Pack<T>::Mask;
  // An upper half of a positive number may be zero, and is not after the carry of a lower half that is not.
  static NEGMERGE_INLINE Ordered of(typename Pack<T>::N d) {
    return (Ordered)(kHalves ? _mm256_add_epi64((__m256i)d, _mm256_set1_epi64x(0xffffffff)) : (__m256i)d);
  }
  // `least`, with its sign turned where `greatest` is negative, and zero where that is zero.
  static NEGMERGE_INLINE Mask unity(Ordered least, Ordered greatest) {
    const __m256i signs = _mm256_sign_epi32((__m256i)least, (__m256i)greatest);
    return (Mask)(kHalves ? _mm256_blend_epi32(__m256i{}, signs, 0xaa) : signs);
  }
#else
  using Ordered = std::conditional_t<kIntegersAreFast<T>, typename Pack<T>::Mask, typename Pack<T>::N>;
  static NEGMERGE_INLINE Ordered of(typename Pack<T>::N d) { return (Ordered)d; }
  static NEGMERGE_INLINE Ordered unity(Ordered least, Ordered greatest) { return greater(-greatest, least); }
#endif
};
template <class T, class N>
using OfPacks = OneSign<T, N, Order<T>>;

// in_range for the packs of a step. False alarms are allowed: where nothing is rounded, the sum tells of both packs. As integers,
// magnitudes have the same order, and NaN is the greatest.
template <class S, class F>
NEGMERGE_INLINE bool all_in_range(const F (&x)[kPacks]) {
  using Mask = decltype(x[0] < x[0]);
  static_assert(kPacks == 2, "both at once");
  if constexpr (sizeof(typename S::Bits) == sizeof(typename S::Float))
    return all_negative((Mask)magnitude(x[0] + x[1]) - (Mask)(F{} + S::kOverflow));
  else if constexpr (kIntegersAreFast<typename S::Float>)
    return all_negative(greater((Mask)magnitude(x[0]), (Mask)magnitude(x[1])) - (Mask)(F{} + S::kOverflow));
  else return all_negative(in_range<S>(x[0]) & in_range<S>(x[1]));
}

// Whether all of a step is finite, the results in storage too, where the models agree. False alarms are allowed.
template <class S, class Accumulator, class F>
NEGMERGE_INLINE bool all_sure(const Accumulator (&s)[kPacks], const F (&merged)[kPacks], const F (&result)[kPacks]) {
  if constexpr (Accumulator::kResultTells) return all_in_range<S>(merged);
  else return all_in_range<S>(result) && all_negative((s[0].finite() & s[1].finite()));
}

struct Counts {
  std::int64_t agreed = 0, nonfinite = 0, vetoed = 0;

  // Adds to the counts of a segment, and starts again. shared: other threads may do so, too.
  void flush(std::int64_t* to, bool shared) {
    const std::int64_t found[kCounted] = {agreed, nonfinite, vetoed};
    for (int i = 0; i < kCounted; ++i) {
      if (!shared) to[i] += found[i];
      else if (found[i]) __atomic_fetch_add(to + i, found[i], __ATOMIC_RELAXED);
    }
    *this = {};
  }
};

// Merges elements begin … end of a tile one by one: those that may not be finite.
template <class T, class S, class O, bool kConsensus, class Accumulator>
__attribute__((noinline)) void merge_each(const Batch& batch, const Constants<T>& constants, const Tile& tile, int begin, int end,
                                          Counts& counts) {
  using Bits = typename S::Bits;
  const char* base = tile.base(batch);
  char* out = tile.out<O>();
  for (int i = begin; i < end; ++i) {
    const Bits bits = base ? read<Bits>(base + i * sizeof(Bits)) : Bits{};
    const T b = static_cast<T>(S::template widen<typename S::Float>(static_cast<typename S::Word>(bits)));
    typename Accumulator::OfOne accumulator;
    for (std::int64_t k = 0; k < batch.n; ++k) {
      const T x = load_one<T>(batch.dtypes[k], tile.model(batch, k) + i * kSizes[batch.dtypes[k]]);
      const T from = holds<S>(batch.dtypes[k]) ? b : rounded_one(batch.dtypes[k], b);
      // Of means, only d_k tells where b is not finite.
      if (kConsensus && batch.task_vectors) accumulator.accumulate(x - (b - b));
      else accumulator.accumulate(batch.task_vectors ? x : x - from);
    }
    typename O::Bits kept{};
    if constexpr (!kConsensus) kept = bits;
    const auto outcome = finish<O>(kept, accumulator, constants);
    counts.agreed += outcome.agreed;
    counts.nonfinite += !outcome.finite;
    counts.vetoed += outcome.vetoed;
    if (out) memcpy(out + i * sizeof kept, &outcome.bits, sizeof kept);
  }
}

// The operands that are read next, prefetched a line at a time.
struct Ahead {
  const char* operands[kGroup];
  int count = 0;
  std::int64_t size = 0;  // of an element

  NEGMERGE_INLINE void prefetch(std::int64_t element) const {
    const std::int64_t offset = element * size;
    if (!count || offset % kLine) return;
#pragma GCC unroll 1
    for (int k = 0; k < count; ++k) __builtin_prefetch(operands[k] + offset, 0, 2);
  }
};

// A stream over steps; of a base that is null, the same zeros at each step, and of an output that is null, the same memory.
struct Stream {
  char* at;
  std::int64_t step;  // bytes

  NEGMERGE_INLINE char* operator[](int i) const { return at + i * step; }
};

// A base of zeros.
alignas(64) constexpr char kZeros[kStepBytes] = {};

// Bytes that clear what they are and-ed with, then as many that keep it.
struct Keep {
  char bytes[2 * kStepBytes] = {};
  constexpr Keep() {
    for (int i = kStepBytes; i < 2 * kStepBytes; ++i) bytes[i] = static_cast<char>(0xff);
  }
};
constexpr Keep kKeep;

// One group of models over the steps of a tile.
template <class Accumulator>
struct Pass {
  const char* x[kGroup];
  int count;
  Stream from, base, out;     // from: what d_k subtracts
  Accumulator* accumulators;  // of all packs, between groups
  bool first, last, past_cache;
  Ahead ahead;
};

// Accumulates a group of G models, or pass.count if G is 0, of storage type M over steps of a tile; the last group also finishes
// and stores them. S is the type of pass.from, O that of pass.base and pass.out. kSingle: there is no other group. Returns where it
// stopped: at the end, or at a step in which anything may not be finite. No call is in this loop, so that all values of a step stay
// in registers.
template <class T, class S, class O, class M, bool kSame, class Accumulator, int G, bool kSingle>
__attribute__((noinline)) int merge_steps(const Pass<Accumulator>& pass, const Constants<T>& constants, int at, int steps,
                                          Counts& counts) {
  using P = Pack<T>;
  using N = typename P::N;
  using F = typename P::template Of<typename O::Float>;
  constexpr std::int64_t bytes = P::step * sizeof(typename M::Bits);
  const char* x[kGroup];
  for (int k = 0; k < (G ? G : pass.count); ++k) x[k] = pass.x[k];
  const char *from = pass.from[at], *base = pass.base[at];
  char* out = pass.out[at];
  const std::int64_t from_step = pass.from.step, base_step = pass.base.step, out_step = pass.out.step;
  const bool first = kSingle || pass.first, last = kSingle || pass.last, past_cache = pass.past_cache;
  // In registers: what is stored might be these, as far as the compiler knows. Where it knows n, it divides by a power of two by a
  // multiplication, which gives the same bits.
  Constants<T> c = constants;
  if (kSingle && G) c.n = G;
  typename P::Mask agreed{}, vetoed{};
  for (; at < steps; ++at, from += from_step, base += base_step, out += out_step) {
    if (!kSingle) pass.ahead.prefetch(at * P::step);
    const std::int64_t offset = at * bytes;
    Accumulator s[kPacks];
    N minus[kPacks];
    for (int j = 0; j < kPacks; ++j) minus[j] = N{} - origin<T, S, M, kSame>(from, j);
    const auto d = [&](int k, int j) { return load<M, T, kSame>(x[k] + offset, j) + minus[j]; };
    for (int j = 0; j < kPacks; ++j) {
      if (first) s[j].start(d(0, j));
      else (s[j] = pass.accumulators[at * kPacks + j]).accumulate(d(0, j));
    }
    if constexpr (G) {
#pragma GCC unroll 8
      for (int k = 1; k < G; ++k)
        for (int j = 0; j < kPacks; ++j) s[j].accumulate(d(k, j));
    } else {
#pragma GCC unroll 1
      for (int k = 1; k < pass.count; ++k)
        for (int j = 0; j < kPacks; ++j) s[j].accumulate(d(k, j));
    }
    if (!last) {
      for (int j = 0; j < kPacks; ++j) pass.accumulators[at * kPacks + j] = s[j];
      continue;
    }
    typename P::Mask agree[kPacks], veto[kPacks];
    F merged[kPacks], result[kPacks];
    for (int j = 0; j < kPacks; ++j) {
      const N b = load<O, T, kSame>(base, j);
      const F kept = convert<F>(b);
      merged[j] = convert<F>(negated(b, s[j], c));
      agree[j] = s[j].agree(c);
      veto[j] = s[j].vetoed_by_zero(c);
      result[j] = convert<decltype(F{} < F{})>(agree[j]) ? merged[j] : kept;
    }
    if (__builtin_expect(!all_sure<O>(s, merged, result), 0)) break;
    for (int j = 0; j < kPacks; ++j) {
      agreed -= agree[j];
      vetoed -= veto[j];
    }
    store_step<O, S, kSame>(out, result, past_cache);
  }
  for (int lane = 0; lane < P::lanes; ++lane) counts.agreed += agreed[lane], counts.vetoed += vetoed[lane];
  return at;
}

template <class T, class Accumulator>
using MergeSteps = int (*)(const Pass<Accumulator>&, const Constants<T>&, int, int, Counts&);

// The loop for a group of models of one type, which is the base's if kSame.
template <class T, class S, class O, bool kSame, class Accumulator, bool kSingle>
MergeSteps<T, Accumulator> steps_of(Dtype dtype, int group) {
  // Consensus deltas of 16-bit models in several groups are not worth the compiler's time.
  if constexpr (kSame && Accumulator::kResultTells && (kSingle || std::is_same_v<S, O>)) {
    static constexpr MergeSteps<T, Accumulator> of[] = {
        merge_steps<T, S, O, S, true, Accumulator, 1, kSingle>, merge_steps<T, S, O, S, true, Accumulator, 2, kSingle>,
        merge_steps<T, S, O, S, true, Accumulator, 3, kSingle>, merge_steps<T, S, O, S, true, Accumulator, 4, kSingle>,
        merge_steps<T, S, O, S, true, Accumulator, 5, kSingle>, merge_steps<T, S, O, S, true, Accumulator, 6, kSingle>,
        merge_steps<T, S, O, S, true, Accumulator, 7, kSingle>, merge_steps<T, S, O, S, true, Accumulator, 8, kSingle>};
    return of[group - 1];
  } else if constexpr (kSame) {
    return merge_steps<T, S, O, S, true, Accumulator, 0, false>;
  } else {
    if constexpr (sizeof(T) == 8)
      if (dtype == kF64) return merge_steps<T, S, O, F64, false, Accumulator, 0, false>;
    if (dtype == kF32) return merge_steps<T, S, O, F32, false, Accumulator, 0, false>;
    if (dtype == kF16) return merge_steps<T, S, O, F16, false, Accumulator, 0, false>;
    return merge_steps<T, S, O, BF16, false, Accumulator, 0, false>;
  }
}

// Merges a range of a batch. kSame: the models are stored as the base is, S. kConsensus: only to its means (batch.h).
template <class T, class S, bool kSame, template <class, class> class Rule, bool kConsensus>
class Range {
 public:
  Range(const Batch& batch, Position position, std::int64_t elements, bool in_cache)
      : batch_(batch), constants_{static_cast<T>(batch.scale), static_cast<T>(batch.n), static_cast<T>(batch.required),
                                  static_cast<T>(batch.n - batch.required)},
        position_(position), elements_(elements),
        tile_(group_at(0) == batch.n && !only_checked() ? kLongTile : P::tile), in_cache_(in_cache) {}

  void merge() {
    std::int64_t begin = position_.start;  // of this range, in the tile's segment
    for (Tile tile = next_tile(); tile.row;) {
      const Tile next = next_tile();
      merge_tile(tile, next);
      if (next.row != tile.row) {
        counts_.flush(batch_.counts + kCounted * tile.segment, begin || tile.start + tile.count < tile.row[0]);
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
  using Accumulator = Rule<T, typename P::N>;
  using O = std::conditional_t<!kConsensus, S, std::conditional_t<sizeof(T) == 8, F64, F32>>;  // the output's type

  // The next tile, if there is one.
  Tile next_tile() {
    while (position_.segment < batch_.segments && position_.start == batch_.row(position_.segment)[0])
      position_ = {position_.segment + 1, 0};
    if (!elements_ || position_.segment == batch_.segments) return {};
    const std::int64_t* row = batch_.row(position_.segment);
    std::int64_t count = row[0] - position_.start;
    if (count > tile_) count = tile_;
    if (count > elements_) count = elements_;
    const Tile tile{row, position_.segment, position_.start, static_cast<int>(count)};
    position_.start += count;
    elements_ -= count;
    return tile;
  }

  // The size of the group from model k on: models of one storage type.
  int group_at(std::int64_t k) const {
    const std::int64_t most = batch_.n - k < kGroup ? batch_.n - k : kGroup;
    int same = kSame ? most : 1;
    while (same < most && batch_.dtypes[k + same] == batch_.dtypes[k]) ++same;
    return same;
  }

  void merge_tile(const Tile& tile, const Tile& next) {
    const char* base = tile.base(batch_);
    char* out = tile.template out<O>();
    const int steps = tile.count / P::step, rest = tile.count % P::step, whole = tile.count - rest;
    Pass<Accumulator> pass;
    pass.past_cache = NEGMERGE_PAST_CACHE && !in_cache_ && out && out != base && reinterpret_cast<std::uintptr_t>(out) % kPackBytes == 0;
    pass.base = base ? Stream{const_cast<char*>(base), kBaseStep} : zeros();
    if constexpr (kConsensus) pass.from = subtracted(pass.base, whole);
    pass.out = out ? Stream{out, kOutStep} : Stream{unused_, 0};
    if (steps) merge_groups(pass, tile, next, 0, steps);
    if (!rest) return;
    // Elements behind the last step are copied to the end of one of zeros. Those are vetoed, and not counted.
    pass.past_cache = false;
    if (base) pass.base = {copied(base, sizeof(typename S::Bits), whole, rest, base_), 0};
    if constexpr (kConsensus) pass.from = subtracted(pass.base, P::step);
    pass.out = {unused_, 0};
    if (!merge_groups(pass, tile, {}, whole, 1)) return;
    counts_.vetoed -= P::step - rest;
    const std::int64_t size = sizeof(typename O::Bits);
    if (out) memcpy(out + whole * size, unused_ + (P::step - rest) * size, rest * size);
  }

  // Merges steps of a tile from element `begin` on; if it has not so many elements, they are copied. Returns false if any were
  // merged one by one.
  __attribute__((noinline)) bool merge_groups(Pass<Accumulator>& pass, const Tile& tile, const Tile& next, int begin, int steps) {
    const int elements = tile.count - begin < steps * P::step ? tile.count - begin : steps * P::step;
    bool sure = true;
    if constexpr (kConsensus) pass.base = zeros();
    else pass.from = batch_.task_vectors ? zeros() : pass.base;
    pass.accumulators = accumulators_.each;
    for (std::int64_t k = 0; k < batch_.n; k += pass.count) {
      const Dtype dtype = batch_.dtypes[k];
      pass.count = group_at(k);
      for (int i = 0; i < pass.count; ++i) {
        pass.x[i] = tile.model(batch_, k + i);
        if (elements < P::step) pass.x[i] = copied(pass.x[i], kSizes[dtype], begin, elements, operands_[i]);
      }
      pass.first = k == 0;
      pass.last = k + pass.count == batch_.n;
      const bool single = pass.first && pass.last;
      if (!single && NEGMERGE_PREFETCH && !in_cache_) pass.ahead = pass.last ? ahead_of(next, 0) : ahead_of(tile, k + pass.count);
      const auto run = single ? steps_of<T, S, O, kSame, Accumulator, true>(dtype, pass.count)
                             : steps_of<T, S, O, kSame, Accumulator, false>(dtype, pass.count);
      for (int at = 0; (at = run(pass, constants_, at, steps, counts_)) < steps; ++at) {
        const int from = begin + at * P::step, end = from + P::step;
        merge_each<T, S, O, kConsensus, Accumulator>(batch_, constants_, tile, from, end < tile.count ? end : tile.count, counts_);
        sure = false;
      }
    }
    return sure;
  }

  static Stream zeros() { return {const_cast<char*>(kZeros), 0}; }

  // Whether the base only keeps elements that are not finite from agreeing: it is no part of d_k, nor of the mean.
  bool only_checked() const { return kConsensus && batch_.task_vectors; }

  // What d_k subtracts, of so many elements of a base.
  Stream subtracted(Stream base, int elements) {
    if (!only_checked()) return base;
    if (!base.step && elements > P::step) return zeros();
    // Zero where the base is finite, NaN where it is not.
    using Bits = typename S::Bits;
    constexpr Bits infinity = static_cast<Bits>(((std::uint64_t{1} << S::kExponent) - 1) << S::kFraction);
    for (int i = 0; i < elements; ++i) {
      const Bits bits = read<Bits>(base.at + i * sizeof(Bits)), odd = (bits & infinity) == infinity ? static_cast<Bits>(~Bits{}) : Bits{};
      memcpy(checked_ + i * sizeof(Bits), &odd, sizeof odd);
    }
    return {checked_, base.step};
  }

  // The last `rest` elements, those from `begin` on, copied to the end of a step of zeros.
  static char* copied(const char* from, std::int64_t size, std::int64_t begin, int rest, char* to) {
    const std::int64_t step = P::step * size, zeros = (P::step - rest) * size;
    const char* end = from + (begin + rest) * size;
    if (begin) {
      // What is before them can be read, too, so that no loop is over a few bytes.
      const char* keep = kKeep.bytes + kStepBytes - zeros;
      for (int i = 0; i < step; i += 8) {
        const auto word = read<std::uint64_t>(end - step + i) & read<std::uint64_t>(keep + i);
        memcpy(to + i, &word, 8);
      }
    } else {
      memset(to, 0, zeros);
      memcpy(to + zeros, from, rest * size);
    }
    return to;
  }

  // The operands of the group from model k on, in a tile.
  Ahead ahead_of(const Tile& tile, std::int64_t k) const {
    Ahead ahead;
    if (!tile.row) return ahead;
    ahead.count = group_at(k);
    ahead.size = kSizes[batch_.dtypes[k]];
    for (int i = 0; i < ahead.count; ++i) ahead.operands[i] = tile.model(batch_, k + i);
    return ahead;
  }

  // Not constructed: the first group writes what later ones read, and constructing them would take half as long as a tile.
  union Unwritten {
    Unwritten() {}
    Accumulator each[P::tile / P::lanes];
  };

  static constexpr std::int64_t kBaseStep = P::step * sizeof(typename S::Bits), kOutStep = P::step * sizeof(typename O::Bits);
  const Batch& batch_;
  const Constants<T> constants_;
  Position position_;
  std::int64_t elements_;
  const int tile_;
  const bool in_cache_;
  Counts counts_;
  alignas(64) char unused_[kStepBytes], base_[kStepBytes], operands_[kGroup][kStepBytes];
  alignas(64) Unwritten accumulators_;
  alignas(64) char checked_[kConsensus ? kTileBytes : 1];
};

template <class T, class S, bool kConsensus>
void merge_range(const Batch& batch, Position from, std::int64_t elements, bool in_cache) {
  bool same = true;
  for (std::int64_t k = 0; k < batch.n; ++k) same &= batch.dtypes[k] == batch.result;
  const bool unanimous = batch.required == batch.n;
  if constexpr (sizeof(T) == sizeof(typename S::Float)) {
    if (same && unanimous) return Range<T, S, true, OfPacks, kConsensus>(batch, from, elements, in_cache).merge();
    if (same) return Range<T, S, true, Majority, kConsensus>(batch, from, elements, in_cache).merge();
  }
  if (unanimous) Range<T, S, false, OfPacks, kConsensus>(batch, from, elements, in_cache).merge();
  else Range<T, S, false, Majority, kConsensus>(batch, from, elements, in_cache).merge();
}

template <class T, class S>
void merge_range(const Batch& batch, Position from, std::int64_t elements, bool in_cache) {
  batch.consensus ? merge_range<T, S, true>(batch, from, elements, in_cache)
                  : merge_range<T, S, false>(batch, from, elements, in_cache);
}

template <class T>
void merge_range(const Batch& batch, Position from, std::int64_t elements, bool in_cache) {
  with_type<T>(batch.result, [&](auto type) { merge_range<T, decltype(type)>(batch, from, elements, in_cache); });
}

}  // namespace

void NEGMERGE_LOOP(const Batch& batch, Position from, std::int64_t elements, bool in_cache) {
  is_double(batch) ? merge_range<double>(batch, from, elements, in_cache) : merge_range<float>(batch, from, elements, in_cache);
}

}  // namespace negmerge
