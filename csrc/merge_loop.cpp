// The rule over consecutive elements, on one thread. Compiled once for each instruction set (CMakeLists.txt).
//
// A tile has as many elements as keep their accumulators in the first-level cache. It is merged with the models in groups of
// up to 8. Within a group the accumulators stay in registers, and the hardware reads 8 operands well; meanwhile the next
// group's tile is prefetched to the second-level cache. All models at once would touch as many pages, a line at a time. One
// model at a time would move all accumulators for every element. Both are slower: bench/results/loop.jsonl.
#include "merge_loop.h"

#include <type_traits>

#include "dtypes.h"
#include "merge_rule.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

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
constexpr int kGroup = NEGMERGE_GROUP;           // models at once
#ifdef __AVX2__
constexpr int kPackBytes = 32;
#else
constexpr int kPackBytes = 16;
#endif
constexpr int kLine = 64;
constexpr int kPacks = 2;  // at once: their accumulators fit 16 registers

template <class E, int lanes>
struct Vector {
  typedef E type __attribute__((vector_size(sizeof(E) * lanes)));
};

// Packs for one arithmetic type: of numbers, and of other types with as many lanes.
template <class T>
struct Pack {
  static constexpr int lanes = kPackBytes / sizeof(T);
  template <class E>
  using Of = typename Vector<E, lanes>::type;
  using N = Of<T>;
  using Mask = decltype(N{} < N{});
  static constexpr int step = kPacks * lanes;
  static constexpr int tile = kTileBytes / sizeof(T);
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

// The compiler's own conversions of 16-bit integers take five instructions for these two.
#ifdef __AVX2__
// 16-bit integers to the upper halves of 32-bit ones.
NEGMERGE_INLINE __m256i upper_halves(const char* from) {
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i order = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                         -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return _mm256_shuffle_epi8(twice, order);
}
#endif

// 32-bit integers that fit 16 bits.
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

// A pack of storage type S, as numbers of the arithmetic type.
template <class S, class T>
NEGMERGE_INLINE typename Pack<T>::N load(const char* from) {
  using P = Pack<T>;
  using N = typename P::N;
  using F = typename P::template Of<typename S::Float>;
  using Word = typename P::template Of<typename S::Word>;
  const auto bits = read<typename P::template Of<typename S::Bits>>(from);
#ifdef __AVX2__
  if constexpr (sizeof(bits) == 16 && std::is_same_v<S, BF16>) return (N)upper_halves(from);
#endif
#ifdef __F16C__
  if constexpr (sizeof(bits) == 16 && S::kHalf) return (N)_mm256_cvtph_ps((__m128i)bits);
  if constexpr (sizeof(bits) == 8 && S::kHalf) return (N)_mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadu_si64(from)));
#endif
  return convert<N>(S::template widen<F>(convert<Word>(bits)));
}

// Rounds and stores numbers in the range of S. past_cache: not through the cache, where the address allows it.
template <class S, class F>
NEGMERGE_INLINE void store(char* to, F x, [[maybe_unused]] bool past_cache) {
  constexpr int lanes = sizeof(F) / sizeof(typename S::Float);
  using Word = typename Vector<typename S::Word, lanes>::type;
  using Bits = typename Vector<typename S::Bits, lanes>::type;
  Bits bits;
#ifdef __F16C__
  if constexpr (S::kHalf && lanes == 8) bits = (Bits)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
  else
#endif
    bits = narrowed<Bits>(S::template round<Word>(x));
#ifdef __AVX2__
  if constexpr (sizeof bits == 32)
    if (past_cache) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)bits);
#endif
  memcpy(to, &bits, sizeof bits);
}

// Whether an output is stored past the cache: whole aligned packs of 32 bytes, apart from the base. Through the cache, its old
// bytes would be read first.
template <class S, class T>
bool past_cache(const char* out, const char* base) {
  return NEGMERGE_PAST_CACHE && out != base && Pack<T>::lanes * sizeof(typename S::Bits) == 32 &&
         reinterpret_cast<std::uintptr_t>(out) % 32 == 0;
}

template <class Mask>
NEGMERGE_INLINE bool all(Mask mask) {
#if defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) == -1;
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)mask) == 0xffff;
#else
  const auto halves = bits_as<Vector<std::int64_t, 2>::type>(mask);
  return (halves[0] & halves[1]) == -1;
#endif
}

// b as d_k of a model of type M takes it, where M does not hold every value of the base's type.
template <class M, class T>
T rounded_one(T b) {
  return static_cast<T>(as_stored<M, typename M::Word>(static_cast<typename M::Float>(b)));
}
template <class T>
T rounded_one(Dtype dtype, T b) {
  return dtype == kF32 ? rounded_one<F32>(b) : dtype == kF16 ? rounded_one<F16>(b) : rounded_one<BF16>(b);
}

// Whether a type of models holds every value of the base's type S.
template <class S>
bool holds(Dtype dtype) {
  return dtype == kF64 || (dtype == kF32 ? kHolds<F32, S> : dtype == kF16 ? kHolds<F16, S> : kHolds<BF16, S>);
}

// Whether some d_k of a batch subtracts a rounded base.
template <class S>
bool rounds_base(const Batch& batch) {
  bool found = false;
  for (std::int64_t k = 0; k < batch.n; ++k) found |= !holds<S>(batch.dtypes[k]);
  return found && !batch.task_vectors;
}

template <class T>
NEGMERGE_INLINE T load_one(Dtype dtype, const char* from) {
  switch (dtype) {
    case kF64: return static_cast<T>(read<double>(from));
    case kF32: return static_cast<T>(read<float>(from));
    case kF16: return static_cast<T>(F16::widen<float>(std::uint32_t{read<std::uint16_t>(from)}));
    default: return static_cast<T>(BF16::widen<float>(std::uint32_t{read<std::uint16_t>(from)}));
  }
}

struct Counts {
  std::int64_t agreed = 0, nonfinite = 0, vetoed = 0;

  // Adds to the counts of a segment, and starts again.
  void flush(std::int64_t* to) {
    __atomic_fetch_add(to, agreed, __ATOMIC_RELAXED);
    __atomic_fetch_add(to + 1, nonfinite, __ATOMIC_RELAXED);
    __atomic_fetch_add(to + 2, vetoed, __ATOMIC_RELAXED);
    *this = {};
  }
};

// A batch, and the rule's parameters in one arithmetic type. rounded: memory for a tile of a base rounded to the type of
// models that do not hold it; null if all do.
template <class T>
struct KernelArgs {
  const Batch& batch;
  Constants<T> constants;
  typename Pack<T>::N* rounded;
};

// The part of a segment that is in one tile.
struct Tile {
  const std::int64_t* row = nullptr;  // of the descriptors; null: no tile
  std::int64_t segment = 0, start = 0;
  int count = 0;

  const char* base(const Batch& b) const {
    return row[1] ? reinterpret_cast<const char*>(row[1]) + start * kSizes[b.result] : nullptr;
  }
  char* out(const Batch& b) const { return row[2] ? reinterpret_cast<char*>(row[2]) + start * kSizes[b.result] : nullptr; }
  const char* model(const Batch& b, std::int64_t k) const {
    return reinterpret_cast<const char*>(row[3 + k]) + start * kSizes[b.dtypes[k]];
  }
};

// A base of zeros.
alignas(64) const char kZeros[kTileBytes] = {};

// A tile's accumulators, not constructed: the first group writes them, and constructing them would take half as long as a tile.
template <class Accumulator, int count>
union Unwritten {
  Unwritten() {}
  Accumulator each[count];
};

// Merges elements begin … end of a tile one by one: those behind the last whole pack, and those that may not be finite.
template <class T, class S, template <class, class> class Accumulator>
__attribute__((noinline)) void merge_each(const KernelArgs<T>& args, const Tile& tile, int begin, int end, Counts& counts) {
  const Batch& batch = args.batch;
  using Bits = typename S::Bits;
  const char* base = tile.base(batch);
  char* out = tile.out(batch);
  for (int i = begin; i < end; ++i) {
    const Bits bits = base ? read<Bits>(base + i * sizeof(Bits)) : Bits{};
    const T b = static_cast<T>(S::template widen<typename S::Float>(static_cast<typename S::Word>(bits)));
    Accumulator<T, T> accumulator;
    for (std::int64_t k = 0; k < batch.n; ++k) {
      const T x = load_one<T>(batch.dtypes[k], tile.model(batch, k) + i * kSizes[batch.dtypes[k]]);
      const T from = holds<S>(batch.dtypes[k]) ? b : rounded_one(batch.dtypes[k], b);
      accumulator.accumulate(batch.task_vectors ? x : x - from);
    }
    const auto outcome = finish<S>(bits, accumulator, args.constants);
    counts.agreed += outcome.agreed;
    counts.nonfinite += !outcome.finite;
    counts.vetoed += outcome.vetoed;
    if (out) memcpy(out + i * sizeof(Bits), &outcome.bits, sizeof(Bits));
  }
}

// The operands that are read next, prefetched a line at a time.
struct Ahead {
  const char* operands[kGroup];
  int count = 0;
  std::int64_t size = 0;  // of an element

  NEGMERGE_INLINE void prefetch(std::int64_t element) const {
    const std::int64_t offset = element * size;
    if (!NEGMERGE_PREFETCH || offset % kLine) return;
    for (int k = 0; k < count; ++k) __builtin_prefetch(operands[k] + offset, 0, 2);
  }
};

// The size of the group from model k on: 8, 4, 2 or 1 models of one storage type.
int group_at(const Batch& batch, std::int64_t k) {
  int same = 1;
  while (same < kGroup && k + same < batch.n && batch.dtypes[k + same] == batch.dtypes[k]) ++same;
  return same >= 8 ? 8 : same >= 4 ? 4 : same >= 2 ? 2 : 1;
}

// Accumulates G models of storage type M over the whole packs of a tile. from: what is subtracted, b or zeros.
template <class T, class M, class Accumulator, int G>
void accumulate(const char* const* x, const typename Pack<T>::N* from, Accumulator* accumulators, int packs, bool first,
                const Ahead& ahead) {
  constexpr int bytes = Pack<T>::lanes * sizeof(typename M::Bits);
  const char* operands[G];
  for (int k = 0; k < G; ++k) operands[k] = x[k];
  for (int at = 0; at < packs; at += kPacks) {
    ahead.prefetch(at * Pack<T>::lanes);
    Accumulator s[kPacks];
    typename Pack<T>::N b[kPacks];
    for (int j = 0; j < kPacks; ++j) {
      b[j] = from[at + j];
      if (!first) s[j] = accumulators[at + j];
    }
#pragma GCC unroll 8
    for (int k = 0; k < G; ++k)
#pragma GCC unroll 2
      for (int j = 0; j < kPacks; ++j) s[j].accumulate(load<M, T>(operands[k] + (at + j) * bytes) - b[j]);
    for (int j = 0; j < kPacks; ++j) accumulators[at + j] = s[j];
  }
}

template <class T, class Accumulator, int G>
void accumulate(Dtype dtype, const char* const* x, const typename Pack<T>::N* from, Accumulator* accumulators, int packs,
                bool first, const Ahead& ahead) {
  switch (dtype) {
    case kF64:
      if constexpr (sizeof(T) == 8) accumulate<T, F64, Accumulator, G>(x, from, accumulators, packs, first, ahead);
      break;
    case kF32: accumulate<T, F32, Accumulator, G>(x, from, accumulators, packs, first, ahead); break;
    case kF16: accumulate<T, F16, Accumulator, G>(x, from, accumulators, packs, first, ahead); break;
    case kBF16: accumulate<T, BF16, Accumulator, G>(x, from, accumulators, packs, first, ahead); break;
  }
}

// Rounds the whole packs of a base to storage type M.
template <class T, class M>
__attribute__((noinline)) const typename Pack<T>::N* rounded(const typename Pack<T>::N* b, typename Pack<T>::N* to, int packs) {
  using P = Pack<T>;
  for (int at = 0; at < packs; ++at) {
    const auto x = convert<typename P::template Of<typename M::Float>>(b[at]);
#ifdef __F16C__
    if constexpr (sizeof x == 32 && M::kHalf) {
      to[at] = (typename P::N)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
      continue;
    }
#endif
    to[at] = convert<typename P::N>(as_stored<M, typename P::template Of<typename M::Word>>(x));
  }
  return to;
}

// What d_k of models of a type subtracts: b, or b rounded where the type does not hold every value of the base's, S.
template <class T, class S>
const typename Pack<T>::N* origin(Dtype dtype, const typename Pack<T>::N* b, typename Pack<T>::N* to, int packs) {
  if (holds<S>(dtype)) return b;
  return dtype == kF32 ? rounded<T, F32>(b, to, packs) : dtype == kF16 ? rounded<T, F16>(b, to, packs) : rounded<T, BF16>(b, to, packs);
}

// Finishes packs of a tile from `at` on: from accumulators to stored bits. Returns where it stopped: at the end, or at a step in
// which anything may not be finite. No call is in this loop, so that the counts stay in registers.
template <class T, class S, template <class, class> class Accumulator>
NEGMERGE_INLINE int finish_sure_packs(const Constants<T>& constants, char* out, bool past, const typename Pack<T>::N* b,
                                      const Accumulator<T, typename Pack<T>::N>* accumulators, int at, int packs,
                                      const char* ahead, Counts& counts) {
  using P = Pack<T>;
  using N = typename P::N;
  using F = typename P::template Of<typename S::Float>;
  constexpr int bytes = P::lanes * sizeof(typename S::Bits);
  typename P::Mask agreed{}, vetoed{};
  for (; at < packs; at += kPacks) {
    if (NEGMERGE_PREFETCH && at * bytes % kLine == 0) __builtin_prefetch(ahead + at * bytes, 0, 2);
    typename P::Mask agree[kPacks], veto[kPacks], sure = N{} == N{};
    F result[kPacks];
    for (int j = 0; j < kPacks; ++j) {
      const Accumulator<T, N>& s = accumulators[at + j];
      const N merged = negated(b[at + j], s, constants);
      agree[j] = s.agree(constants);
      veto[j] = s.vetoed_by_zero(constants);
      result[j] = convert<F>(agree[j] ? merged : b[at + j]);
      sure &= convert<typename P::Mask>(in_range<S>(s.kResultTells ? convert<F>(merged) : result[j]));
      if (!s.kResultTells) sure &= magnitude(s.sum) < N{} + s.kInf;
    }
    if (__builtin_expect(!all(sure), 0)) break;
    for (int j = 0; j < kPacks; ++j) {
      agreed -= agree[j];
      vetoed -= veto[j];
      if (out) store<S>(out + (at + j) * bytes, result[j], past);
    }
  }
  for (int lane = 0; lane < P::lanes; ++lane) counts.agreed += agreed[lane], counts.vetoed += vetoed[lane];
  return at;
}

// Finishes the whole packs of a tile. A step in which anything may not be finite is merged again, element by element.
template <class T, class S, template <class, class> class Accumulator>
void finish_packs(const KernelArgs<T>& args, const Tile& tile, const typename Pack<T>::N* b,
                  const Accumulator<T, typename Pack<T>::N>* accumulators, int packs, const char* ahead, Counts& counts) {
  constexpr int lanes = Pack<T>::lanes;
  char* out = tile.out(args.batch);
  const bool past = past_cache<S, T>(out, tile.base(args.batch));
  for (int at = 0; at < packs; at += kPacks) {
    at = finish_sure_packs<T, S, Accumulator>(args.constants, out, past, b, accumulators, at, packs, ahead, counts);
    if (at < packs) merge_each<T, S, Accumulator>(args, tile, at * lanes, (at + kPacks) * lanes, counts);
  }
}

// The operands of the group from model k on, in a tile.
Ahead ahead_of(const Batch& batch, const Tile& tile, std::int64_t k) {
  Ahead ahead;
  if (!tile.row) return ahead;
  ahead.count = group_at(batch, k);
  ahead.size = kSizes[batch.dtypes[k]];
  for (int i = 0; i < ahead.count; ++i) ahead.operands[i] = tile.model(batch, k + i);
  return ahead;
}

template <class T, class S, template <class, class> class Accumulator>
void merge_tile(const KernelArgs<T>& args, const Tile& tile, const Tile& next, Counts& counts) {
  using P = Pack<T>;
  using N = typename P::N;
  alignas(64) N b[P::tile / P::lanes];
  alignas(64) Unwritten<Accumulator<T, N>, P::tile / P::lanes> accumulators;
  const Batch& batch = args.batch;
  const int packs = tile.count / P::step * kPacks;
  const char* base = tile.base(batch) ? tile.base(batch) : kZeros;
  for (int at = 0; at < packs; ++at) b[at] = load<S, T>(base + at * P::lanes * sizeof(typename S::Bits));
  const N* from = batch.task_vectors ? reinterpret_cast<const N*>(kZeros) : b;
  for (std::int64_t k = 0, group; k < batch.n; k += group) {
    group = group_at(batch, k);
    const char* x[kGroup];
    for (int i = 0; i < group; ++i) x[i] = tile.model(batch, k + i);
    const bool last = k + group == batch.n;
    const Ahead ahead = last ? ahead_of(batch, next, 0) : ahead_of(batch, tile, k + group);
    const Dtype dtype = batch.dtypes[k];
    if (args.rounded && (k == 0 || dtype != batch.dtypes[k - 1])) from = origin<T, S>(dtype, b, args.rounded, packs);
    switch (group) {
      case 8: accumulate<T, Accumulator<T, N>, 8>(dtype, x, from, accumulators.each, packs, k == 0, ahead); break;
      case 4: accumulate<T, Accumulator<T, N>, 4>(dtype, x, from, accumulators.each, packs, k == 0, ahead); break;
      case 2: accumulate<T, Accumulator<T, N>, 2>(dtype, x, from, accumulators.each, packs, k == 0, ahead); break;
      default: accumulate<T, Accumulator<T, N>, 1>(dtype, x, from, accumulators.each, packs, k == 0, ahead); break;
    }
  }
  const char* next_base = next.row && next.base(batch) ? next.base(batch) : base;
  finish_packs<T, S, Accumulator>(args, tile, b, accumulators.each, packs, next_base, counts);
  if (const int whole = packs * P::lanes; whole < tile.count) merge_each<T, S, Accumulator>(args, tile, whole, tile.count, counts);
}

// The tile at a position, which moves behind it.
template <class T>
Tile tile_at(const Batch& batch, Position& position, std::int64_t& elements) {
  while (position.segment < batch.segments && position.start == batch.row(position.segment)[0])
    position = {position.segment + 1, 0};
  if (!elements || position.segment == batch.segments) return {};
  const std::int64_t* row = batch.row(position.segment);
  std::int64_t count = row[0] - position.start;
  if (count > Pack<T>::tile) count = Pack<T>::tile;
  if (count > elements) count = elements;
  const Tile tile{row, position.segment, position.start, static_cast<int>(count)};
  position.start += count;
  elements -= count;
  return tile;
}

template <class T, class S, template <class, class> class Accumulator>
void merge_range(const Batch& batch, Position position, std::int64_t elements) {
  const Constants<T> constants{static_cast<T>(batch.scale), static_cast<T>(batch.n), static_cast<T>(batch.required),
                               static_cast<T>(batch.n - batch.required)};
  alignas(64) typename Pack<T>::N rounded[Pack<T>::tile / Pack<T>::lanes];
  const KernelArgs<T> args{batch, constants, rounds_base<S>(batch) ? rounded : nullptr};
  Counts counts;
  for (Tile tile = tile_at<T>(batch, position, elements); tile.row;) {
    const Tile next = tile_at<T>(batch, position, elements);
    merge_tile<T, S, Accumulator>(args, tile, next, counts);
    if (next.row != tile.row) counts.flush(batch.counts + kCounted * tile.segment);
    tile = next;
  }
#ifdef __AVX2__
  _mm_sfence();  // what was stored past the cache is visible to the thread that waits for this one
#endif
}

template <class T, class S>
void merge_range(const Batch& batch, Position from, std::int64_t elements) {
  if (batch.required == batch.n) merge_range<T, S, Unanimous>(batch, from, elements);
  else merge_range<T, S, Majority>(batch, from, elements);
}

template <class T>
void merge_range(const Batch& batch, Position from, std::int64_t elements) {
  switch (batch.result) {
    case kF64:
      if constexpr (sizeof(T) == 8) merge_range<T, F64>(batch, from, elements);
      break;
    case kF32: merge_range<T, F32>(batch, from, elements); break;
    case kF16: merge_range<T, F16>(batch, from, elements); break;
    case kBF16: merge_range<T, BF16>(batch, from, elements); break;
  }
}

}  // namespace

void NEGMERGE_LOOP(const Batch& batch, Position from, std::int64_t elements) {
  is_double(batch) ? merge_range<double>(batch, from, elements) : merge_range<float>(batch, from, elements);
}

}  // namespace negmerge
