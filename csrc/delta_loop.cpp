// Consensus deltas on one thread. Compiled once for each instruction set (CMakeLists.txt).
//
// A block of elements is done in three steps, between which its numbers lie packed in the first-level cache: the base's elements in the
// mask are gathered, the last line of the rule is computed for them, and they are scattered over the output. Means are packed
// already, and a base that was saved is.
#include "delta.h"

#include <algorithm>
#include <type_traits>

#include "dtypes.h"
#include "merge_rule.h"
#include "packs.h"

// Code for one instruction set must never be linked in place of the same code for another, so that only the table of loops itself
// has external linkage.
namespace negmerge {
namespace {

constexpr std::int64_t kBlock = 2 * kRankBlock;  // elements at once
constexpr int kWords = kBlock / kMaskWord;
constexpr int kLine = 64;
constexpr int kAhead = 2048;  // bytes: so far before they are needed, lines are fetched

// Packed numbers of a block. Whole packs are read and written: behind the last number, too.
struct Packed {
  alignas(64) char bytes[kBlock * 8 + 2 * kLine];
};

NEGMERGE_INLINE int count_of(std::uint64_t word) { return __builtin_popcountll(word); }

// Elements in the registers of this instruction set, and the table that moves those of a mask together, or apart.
#if defined(__AVX512F__)
template <class Bits>
constexpr int kPart = sizeof(Bits) == 8 ? 8 : 16;  // elements at once

// Elements of 16 bits are moved as ones of 32.
template <class Bits>
NEGMERGE_INLINE __m512i load_part(const char* from, unsigned mask) {
  if constexpr (sizeof(Bits) == 8) return _mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), from);
  else if constexpr (sizeof(Bits) == 4) return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), from);
  else return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from));
}
template <class Bits>
NEGMERGE_INLINE void store_part(char* to, unsigned mask, __m512i part) {
  if constexpr (sizeof(Bits) == 8) _mm512_mask_storeu_epi64(to, static_cast<__mmask8>(mask), part);
  else if constexpr (sizeof(Bits) == 4) _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(mask), part);
  else _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), _mm512_cvtepi32_epi16(part));
}
template <class Bits>
NEGMERGE_INLINE __m512i compressed(__m512i part, unsigned mask) {
  if constexpr (sizeof(Bits) == 8) return _mm512_maskz_compress_epi64(static_cast<__mmask8>(mask), part);
  else return _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), part);
}
template <class Bits>
NEGMERGE_INLINE __m512i expanded(__m512i part, unsigned mask) {
  if constexpr (sizeof(Bits) == 8) return _mm512_maskz_expand_epi64(static_cast<__mmask8>(mask), part);
  else return _mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), part);
}
constexpr unsigned kAll = 0xffff;
#endif

// Moves the elements of a word that are set together; returns where the next one goes. Whole packs may be written.
template <class Bits>
NEGMERGE_INLINE char* gather_word(std::uint64_t word, const char* from, char* to) {
#if defined(__AVX512F__)
  constexpr int part = kPart<Bits>;
#pragma GCC unroll 8
  for (int i = 0; i < kMaskWord; i += part) {
    const unsigned mask = word >> i & (part == 8 ? 0xff : kAll);
    store_part<Bits>(to, kAll, compressed<Bits>(load_part<Bits>(from + i * sizeof(Bits), mask), mask));
    to += count_of(mask) * sizeof(Bits);
  }
#else
  for (; word; word &= word - 1, to += sizeof(Bits)) memcpy(to, from + __builtin_ctzll(word) * sizeof(Bits), sizeof(Bits));
#endif
  return to;
}

// Writes packed elements to the places of a word that are set, and to no other; returns where the next one comes from. Whole packs
// are read.
template <class Bits>
NEGMERGE_INLINE const char* scatter_word(std::uint64_t word, const char* from, char* to) {
#if defined(__AVX512F__)
  constexpr int part = kPart<Bits>;
#pragma GCC unroll 8
  for (int i = 0; i < kMaskWord; i += part) {
    const unsigned mask = word >> i & (part == 8 ? 0xff : kAll);
    store_part<Bits>(to + i * sizeof(Bits), mask, expanded<Bits>(load_part<Bits>(from, kAll), mask));
    from += count_of(mask) * sizeof(Bits);
  }
#else
  for (; word; word &= word - 1, from += sizeof(Bits)) memcpy(to + __builtin_ctzll(word) * sizeof(Bits), from, sizeof(Bits));
#endif
  return from;
}

// The words of a block.
struct Words {
  std::uint64_t word[kWords];
  int count;    // of words
  int set = 0;  // elements in the mask

  Words(const char* mask, std::int64_t start, std::int64_t elements)
      : count(static_cast<int>((elements + kMaskWord - 1) / kMaskWord)) {
    memcpy(word, mask + start / 8, count * sizeof word[0]);
    // Nothing behind the last element is written, whatever the mask has there.
    if (elements % kMaskWord) word[count - 1] &= (std::uint64_t{1} << elements % kMaskWord) - 1;
    for (int i = 0; i < count; ++i) set += count_of(word[i]);
  }
};

template <class Bits>
void gather(const Words& words, const char* from, char* to) {
  for (int i = 0; i < words.count; ++i, from += kMaskWord * sizeof(Bits)) to = gather_word<Bits>(words.word[i], from, to);
}
template <class Bits, bool kFetch = false>
void scatter(const Words& words, const char* from, char* to) {
  for (int i = 0; i < words.count; ++i, to += kMaskWord * sizeof(Bits)) {
    if constexpr (kFetch) {
#pragma GCC unroll 8
      for (unsigned line = 0; line < kMaskWord * sizeof(Bits); line += kLine) __builtin_prefetch(to + kAhead + line, 1);
    }
    if (words.word[i]) from = scatter_word<Bits>(words.word[i], from, to);
  }
}

// The results of packed elements i … count, one by one.
template <class T, class S, class M>
__attribute__((noinline)) void negate_each(const char* kept, const char* means, int i, int count, const Constants<T>& c, char* to,
                                           std::int64_t* counts) {
  using Bits = typename S::Bits;
  for (; i < count; ++i) {
    const Bits before = read<Bits>(kept + i * sizeof(Bits));
    const T b = static_cast<T>(S::template widen<typename S::Float>(static_cast<typename S::Word>(before)));
    const auto stored = read<typename M::Bits>(means + i * sizeof(typename M::Bits));
    const T mean = static_cast<T>(M::template widen<typename M::Float>(static_cast<typename M::Word>(stored)));
    const auto result = static_cast<typename S::Float>(negated_mean(b, mean, c));
    const bool finite = in_range<S>(result);
    const Bits bits = finite ? static_cast<Bits>(S::template round<typename S::Word>(result)) : before;
    memcpy(to + i * sizeof(Bits), &bits, sizeof bits);
    counts[0] += bits != before;
    counts[1] += !finite;
  }
}

// Fewer than a pack of elements, and zeros behind them. Nothing behind the last is read.
template <class Bits>
NEGMERGE_INLINE void load_rest(const char* from, int count, char* to) {
#if defined(__AVX512F__)
  store(to, _mm512_maskz_loadu_epi8((std::uint64_t{1} << count * sizeof(Bits)) - 1, from), false);
#else
  memset(to, 0, kLine);
  memcpy(to, from, count * sizeof(Bits));
#endif
}

// The results of packed elements. Whole packs of `to` may be written.
template <class T, class S, class M>
void negate(const char* kept, const char* means, int count, const Constants<T>& c, char* to, std::int64_t* counts) {
  using P = Lanes<T>;
  using F = typename P::template Of<typename S::Float>;
  using Word = typename P::template Of<typename S::Word>;
  using Bits = typename P::template Of<typename S::Bits>;
  using MeanFloat = typename P::template Of<typename M::Float>;
  using MeanWord = typename P::template Of<typename M::Word>;
  using MeanBits = typename P::template Of<typename M::Bits>;
  using Flags = decltype(Bits{} != Bits{});
  static_assert(kBlock / P::lanes < 1 << 15, "flags are counted in 16 bits");
  Flags changed{};
  const auto negate_pack = [&](const char* at, const char* mean_at, int i, int end) __attribute__((always_inline)) {
    const auto b = convert<typename P::N>(load_floats<S, F, Word, Bits>(at));
    const auto mean = convert<typename P::N>(load_floats<M, MeanFloat, MeanWord, MeanBits>(mean_at));
    const F result = convert<F>(negated_mean(b, mean, c));
    if (__builtin_expect(!all_negative(in_range<S>(result)), 0)) return negate_each<T, S, M>(kept, means, i, end, c, to, counts);
    const Bits bits = rounded_bits<S, Bits, Word>(result);
    changed -= bits != read<Bits>(at);
    store(to + i * sizeof(typename S::Bits), bits, false);
  };
  int i = 0;
  for (; i + P::lanes <= count; i += P::lanes)
    negate_pack(kept + i * sizeof(typename S::Bits), means + i * sizeof(typename M::Bits), i, i + P::lanes);
  if (i < count) {  // zeros do not change
    alignas(kLine) char rest[2][kLine];
    load_rest<typename S::Bits>(kept + i * sizeof(typename S::Bits), count - i, rest[0]);
    load_rest<typename M::Bits>(means + i * sizeof(typename M::Bits), count - i, rest[1]);
    negate_pack(rest[0], rest[1], i, count);
  }
  for (int lane = 0; lane < P::lanes; ++lane) counts[0] += changed[lane];
}

// Fetches as many bytes as there are here, of those that will be read soon.
NEGMERGE_INLINE void fetch_ahead(const char* from, std::int64_t size) {
  for (std::int64_t at = 0; at < size; at += kLine) __builtin_prefetch(from + at + kAhead);
}

// Copies bytes past the cache, but for the parts of a line at both ends.
NEGMERGE_INLINE void copy_past_cache(char* to, const char* from, std::int64_t size) {
#ifdef __AVX2__
  const std::int64_t head = std::min<std::int64_t>(-reinterpret_cast<std::intptr_t>(to) & (kLine - 1), size);
  memcpy(to, from, head);
  std::int64_t at = head;
  for (; at + kPackBytes <= size; at += kPackBytes) store(to + at, read<typename Vector<char, kPackBytes>::type>(from + at), true);
  memcpy(to + at, from + at, size - at);
#else
  memcpy(to, from, size);
#endif
}

// Writes elements in the mask over a copy of the base.
template <class Bits>
NEGMERGE_INLINE void write_apart(const Words& words, const char* base, const char* packed, char* out, std::int64_t size, bool in_cache) {
  if (in_cache) {
    memcpy(out, base, size);
    return scatter<Bits>(words, packed, out);
  }
  Packed whole;
  memcpy(whole.bytes, base, size);
  scatter<Bits>(words, packed, whole.bytes);
  copy_past_cache(out, whole.bytes, size);
}

// One block of a segment: elements start … start + elements, of which `first` are set before them.
template <class T, class S, class M>
void apply_block(const DeltaBatch& batch, const DeltaSegment& segment, const Constants<T>& c, std::int64_t start,
                 std::int64_t elements, std::int64_t first, bool in_cache, std::int64_t* counts) {
  using Bits = typename S::Bits;
  constexpr std::int64_t size = sizeof(Bits);
  const Words words(segment.mask, start, elements);
  const char* base = segment.base ? segment.base + start * size : nullptr;
  char* saved = segment.saved ? segment.saved + first * size : nullptr;
  char* out = segment.out ? segment.out + start * size : nullptr;
  Packed kept, result;
  if (base) gather<Bits>(words, base, kept.bytes);
  if (batch.act == Act::kSave) {
    if (words.set) memcpy(saved, kept.bytes, words.set * size);  // the address of nothing may be null
  } else if (batch.act == Act::kRestore) {
    if (words.set) memcpy(kept.bytes, saved, words.set * size);
    if (out) scatter<Bits, true>(words, kept.bytes, out);
  } else {
    const char* means = segment.means + first * sizeof(typename M::Bits);
    fetch_ahead(means, words.set * sizeof(typename M::Bits));
    if (!base) fetch_ahead(saved, words.set * size);
    negate<T, S, M>(base ? kept.bytes : saved, means, words.set, c, result.bytes, counts);
    if (out && base && out != base) write_apart<Bits>(words, base, result.bytes, out, elements * size, in_cache);
    else if (out) base ? scatter<Bits>(words, result.bytes, out) : scatter<Bits, true>(words, result.bytes, out);
  }
}

template <class T, class S, class M>
void apply_blocks(const DeltaBatch& batch, std::int64_t index, std::int64_t first_block, std::int64_t blocks, bool in_cache) {
  const DeltaSegment segment = segment_of(batch, index);
  const Constants<T> constants{static_cast<T>(batch.scale), 0, 0, 0};
  std::int64_t counts[kApplied] = {};
  const std::int64_t end = std::min((first_block + blocks) * kRankBlock, segment.numel);
  for (std::int64_t i = first_block; i < first_block + blocks; i += kBlock / kRankBlock) {
    const std::int64_t start = i * kRankBlock, elements = std::min(kBlock, end - start);
    apply_block<T, S, M>(batch, segment, constants, start, elements, segment.ranks[i], in_cache, counts);
  }
  for (int i = 0; i < kApplied; ++i)
    if (counts[i]) __atomic_fetch_add(batch.counts + kApplied * index + i, counts[i], __ATOMIC_RELAXED);
#ifdef __AVX2__
  _mm_sfence();  // what was stored past the cache is visible to the thread that waits for this one
#endif
}

template <class T, class S>
void apply_blocks(const DeltaBatch& batch, std::int64_t segment, std::int64_t first, std::int64_t blocks, bool in_cache) {
  using Wide = std::conditional_t<sizeof(T) == 8, F64, F32>;
  batch.means == kBF16 ? apply_blocks<T, S, BF16>(batch, segment, first, blocks, in_cache)
                       : apply_blocks<T, S, Wide>(batch, segment, first, blocks, in_cache);
}

template <class T>
void apply_blocks(const DeltaBatch& batch, std::int64_t segment, std::int64_t first, std::int64_t blocks, bool in_cache) {
  with_type<T>(batch.result, [&](auto type) { apply_blocks<T, decltype(type)>(batch, segment, first, blocks, in_cache); });
}

void apply_any(const DeltaBatch& batch, std::int64_t segment, std::int64_t first, std::int64_t blocks, bool in_cache) {
  batch.is_double ? apply_blocks<double>(batch, segment, first, blocks, in_cache)
                  : apply_blocks<float>(batch, segment, first, blocks, in_cache);
}

// Of numbers of type A, the magnitudes that are set when they are stored as M, as integers: above the first and below the second.
template <class A, class M>
constexpr typename A::Bits kZero = 0;
template <class A, class M>
constexpr typename A::Bits kInfinity = typename A::Bits((1ull << A::kExponent) - 1) << A::kFraction;
template <>
constexpr std::uint32_t kZero<F32, BF16> = 0x8000;  // half of the least of BF16, which rounds to zero
template <>
constexpr std::uint32_t kInfinity<F32, BF16> = 0x7f7f8000;

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each 8 bits: the lanes of those that are set, one after the other; and how many are set before each lane.
struct Lanes8 {
  std::uint64_t set[256] = {}, before[256] = {};
  constexpr Lanes8() {
    for (unsigned mask = 0; mask < 256; ++mask)
      for (std::uint64_t lane = 0, found = 0; lane < 8; ++lane) {
        before[mask] |= found << 8 * lane;
        if (mask >> lane & 1) set[mask] |= lane << 8 * found++;
      }
  }
};
constexpr Lanes8 kLanes8;
NEGMERGE_INLINE __m256i permuted(__m256i words, std::uint64_t lanes) {
  return _mm256_permutevar8x32_epi32(words, _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(lanes))));
}
#endif

// Packs one element at a time: j … end of a word of the mask.
template <class A, class M>
NEGMERGE_INLINE char* pack_each(const char* dense, int end, std::uint64_t& word, char* to) {
  using Bits = std::conditional_t<std::is_same_v<A, M>, typename A::Bits, std::uint32_t>;  // as which it is rounded
  using Rounded = std::conditional_t<std::is_same_v<A, M>, A, F32>;
  for (int j = 0; j < end; ++j) {
    const auto x = A::template widen<typename A::Float>(read<typename A::Bits>(dense + j * sizeof(typename A::Bits)));
    const auto bits = bits_as<Bits>(static_cast<typename Rounded::Float>(x));
    const Bits magnitude = bits & static_cast<Bits>(~Bits{} >> 1);
    const bool set = (magnitude > kZero<Rounded, M>) & (magnitude < kInfinity<Rounded, M>);
    const auto stored = static_cast<typename M::Bits>(M::template round<typename M::Word>(bits_as<typename Rounded::Float>(bits)));
    memcpy(to, &stored, sizeof stored);
    word |= std::uint64_t{set} << j;
    to += set * sizeof stored;
  }
  return to;
}

// Packs the 64 elements of a word of the mask. What is behind the packed ones is written to, but not behind as many as were read.
template <class A, class M>
NEGMERGE_INLINE char* pack_word(const char* dense, std::uint64_t& word, char* to) {
  [[maybe_unused]] constexpr bool same = std::is_same_v<A, M>;
#if defined(__AVX512F__)
  if constexpr (same && sizeof(typename A::Bits) == 8) {
#pragma GCC unroll 8
    for (int i = 0; i < kMaskWord; i += 8) {
      const __m512i x = read<__m512i>(dense + i * 8), magnitude = _mm512_and_si512(x, _mm512_set1_epi64(~0ull >> 1));
      const unsigned set = _mm512_cmpgt_epi64_mask(magnitude, __m512i{}) &
                           _mm512_cmplt_epi64_mask(magnitude, _mm512_set1_epi64(kInfinity<A, M>));
      store(to, compressed<std::uint64_t>(x, set), false);
      word |= std::uint64_t{set} << i;
      to += count_of(set) * 8;
    }
    return to;
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kMaskWord; i += 16) {
      __m512i x;
      if constexpr (sizeof(typename A::Bits) == 4) x = read<__m512i>(dense + i * 4);
      else
        x = _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)_mm512_cvtpd_ps(read<__m512d>(dense + i * 8))),
                               (__m256i)_mm512_cvtpd_ps(read<__m512d>(dense + i * 8 + 64)), 1);
      const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi32(0x7fffffff));
      const unsigned set = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(kZero<F32, M>)) &
                           _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(kInfinity<F32, M>));
      if constexpr (same) store(to, compressed<std::uint32_t>(x, set), false);
      else {
        using Word = typename Vector<std::uint32_t, 16>::type;
        const __m512i rounded = (__m512i)BF16::round<Word>(bits_as<typename Vector<float, 16>::type>(x));
        store(to, _mm512_cvtepi32_epi16(compressed<std::uint32_t>(rounded, set)), false);
      }
      word |= std::uint64_t{set} << i;
      to += count_of(set) * sizeof(typename M::Bits);
    }
    return to;
  }
#elif defined(__AVX2__)
  if constexpr (!same || sizeof(typename A::Bits) == 4) {
#pragma GCC unroll 8
    for (int i = 0; i < kMaskWord; i += 8) {
      __m256i x;
      if constexpr (sizeof(typename A::Bits) == 4) x = read<__m256i>(dense + i * 4);
      else x = (__m256i)_mm256_set_m128(_mm256_cvtpd_ps(read<__m256d>(dense + i * 8 + 32)), _mm256_cvtpd_ps(read<__m256d>(dense + i * 8)));
      const __m256i magnitude = _mm256_and_si256(x, _mm256_set1_epi32(0x7fffffff));
      const __m256i flags = _mm256_and_si256(_mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(kZero<F32, M>)),
                                             _mm256_cmpgt_epi32(_mm256_set1_epi32(kInfinity<F32, M>), magnitude));
      const unsigned set = _mm256_movemask_ps((__m256)flags);
      if constexpr (same) store(to, permuted(x, kLanes8.set[set]), false);
      else {
        using Word = typename Vector<std::uint32_t, 8>::type;
        const Word rounded = BF16::round<Word>(bits_as<typename Vector<float, 8>::type>(x));
        store(to, narrowed<Vector<std::uint16_t, 8>::type>((Word)permuted((__m256i)rounded, kLanes8.set[set])), false);
      }
      word |= std::uint64_t{set} << i;
      to += count_of(set) * sizeof(typename M::Bits);
    }
    return to;
  }
#endif
  return pack_each<A, M>(dense, kMaskWord, word, to);
}

template <class A, class M>
std::int64_t pack(const char* dense, std::int64_t numel, char* mask, char* means) {
  char* to = means;
  for (std::int64_t i = 0; i < numel; i += kMaskWord) {
    std::uint64_t word = 0;
    const char* from = dense + i * sizeof(typename A::Bits);
    to = i + kMaskWord <= numel ? pack_word<A, M>(from, word, to) : pack_each<A, M>(from, static_cast<int>(numel - i), word, to);
    memcpy(mask + i / 8, &word, sizeof word);
  }
  return (to - means) / static_cast<std::int64_t>(sizeof(typename M::Bits));
}

std::int64_t pack_any(const char* dense, std::int64_t numel, Dtype arithmetic, Dtype stored, char* mask, char* means) {
  const auto chosen = arithmetic == kF64 ? (stored == kF64 ? pack<F64, F64> : pack<F64, BF16>)
                                         : (stored == kF32 ? pack<F32, F32> : pack<F32, BF16>);
  return chosen(dense, numel, mask, means);
}

// The means of the first `end` elements of a word, and zeros where none is set. Only means that are set are read.
template <class A, class M>
NEGMERGE_INLINE void expand_each(std::uint64_t word, const char* means, int end, char* to) {
  memset(to, 0, end * sizeof(typename A::Bits));
  for (; word; word &= word - 1, means += sizeof(typename M::Bits)) {
    const auto bits = read<typename M::Bits>(means);
    const auto mean = static_cast<typename A::Float>(M::template widen<typename M::Float>(static_cast<typename M::Word>(bits)));
    memcpy(to + __builtin_ctzll(word) * sizeof mean, &mean, sizeof mean);
  }
}

// The same for 64 elements. Whole packs of means are read.
template <class A, class M>
NEGMERGE_INLINE void expand_word(std::uint64_t word, const char* means, char* to) {
  [[maybe_unused]] constexpr std::int64_t size = sizeof(typename A::Bits);
#if defined(__AVX512F__)
  constexpr int part = kPart<typename A::Bits>;
  using P = Lanes<typename A::Float>;
  using MeanBits = typename P::template Of<typename M::Bits>;
#pragma GCC unroll 8
  for (int i = 0; i < kMaskWord; i += part) {
    const unsigned mask = word >> i & (part == 8 ? 0xff : kAll);
    const auto x = convert<typename P::N>(
        load_floats<M, typename P::template Of<typename M::Float>, typename P::template Of<typename M::Word>, MeanBits>(means));
    store(to + i * size, expanded<typename A::Bits>((__m512i)x, mask), false);
    means += count_of(mask) * sizeof(typename M::Bits);
  }
#elif defined(__AVX2__)
  if constexpr (size == 8) return expand_each<A, M>(word, means, kMaskWord, to);
  else {
    using Floats = typename Vector<float, 8>::type;
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
#pragma GCC unroll 8
    for (int i = 0; i < kMaskWord; i += 8) {
      const unsigned mask = word >> i & 0xff;
      const Floats x = load_floats<M, Floats, Vector<std::uint32_t, 8>::type, typename Vector<typename M::Bits, 8>::type>(means);
      const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit), bit);
      store(to + i * size, _mm256_and_si256(permuted((__m256i)x, kLanes8.before[mask]), set), false);
      means += count_of(mask) * sizeof(typename M::Bits);
    }
  }
#else
  expand_each<A, M>(word, means, kMaskWord, to);
#endif
}

// The bits of a mask from one on, up to 64 of them; those behind are zero. Nothing behind their bytes is read.
NEGMERGE_INLINE std::uint64_t bits_at(const char* mask, std::int64_t at, std::int64_t count) {
  const int shift = static_cast<int>(at % 8), bytes = static_cast<int>((shift + count + 7) / 8);
  std::uint64_t word = 0;
  if (bytes >= 8) word = read<std::uint64_t>(mask + at / 8);
  else memcpy(&word, mask + at / 8, bytes);
  word >>= shift;
  if (bytes > 8) word |= static_cast<std::uint64_t>(static_cast<unsigned char>(mask[at / 8 + 8])) << (64 - shift);
  return count < kMaskWord ? word & ((std::uint64_t{1} << count) - 1) : word;
}

std::int64_t rank(const char* mask, std::int64_t begin, std::int64_t end) {
  std::int64_t count = 0;
  for (; begin < end && begin % kMaskWord; ++begin) count += bits_at(mask, begin, 1);
  for (; begin + kMaskWord <= end; begin += kMaskWord) count += count_of(read<std::uint64_t>(mask + begin / 8));
  return begin < end ? count + count_of(bits_at(mask, begin, end - begin)) : count;
}

template <class A, class M>
void expand(const char* mask, std::int64_t begin, std::int64_t numel, const char* means, char* dense) {
  std::int64_t left = rank(mask, begin, begin + numel);  // means
  for (std::int64_t i = 0; i < numel; i += kMaskWord) {
    const std::int64_t count = std::min(kMaskWord, numel - i);
    const std::uint64_t word = bits_at(mask, begin + i, count);
    const int set = count_of(word);
    char* to = dense + i * sizeof(typename A::Bits);
    // So many are left that whole packs can be read.
    if (count == kMaskWord && left >= set + kPackBytes / 2) expand_word<A, M>(word, means, to);
    else expand_each<A, M>(word, means, static_cast<int>(count), to);
    means += set * sizeof(typename M::Bits);
    left -= set;
  }
}

void expand_any(const char* mask, std::int64_t begin, std::int64_t numel, const char* means, Dtype stored, Dtype arithmetic,
                char* dense) {
  const auto chosen = arithmetic == kF64 ? (stored == kF64 ? expand<F64, F64> : expand<F64, BF16>)
                                         : (stored == kF32 ? expand<F32, F32> : expand<F32, BF16>);
  chosen(mask, begin, numel, means, dense);
}

}  // namespace

extern const DeltaLoop NEGMERGE_DELTA_LOOP;
const DeltaLoop NEGMERGE_DELTA_LOOP = {apply_any, pack_any, expand_any, rank};

}  // namespace negmerge
