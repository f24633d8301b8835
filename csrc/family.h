// The rule of the other methods for one element, for host and device.
//
//     p_k = f_k · d_k                        (f_k: the factor of model k)
//     e_k = p_k  if the gate lets d_k pass,  else +0
//     r   = what the election leaves of e_1 … e_n, reduced to one number
//     out = b - λ · (w · r)    if w · r is not zero,   else b      (w: the element's weight)
//
// negmerge_fast/core/choices.py says it to the bit. As in merge_rule.h, N is a number of the arithmetic type T, or a pack of them.
// Elections and reductions are arguments of functions that are inlined: a kernel that is compiled for one has nothing of the others.
#pragma once

#include <cstdint>
#include <cstring>

#include "batch.h"
#include "merge_rule.h"

namespace negmerge {

// Those of merge_rule.h, and the sum of all votes and the masks' λ_t.
template <class T>
struct FamilyConstants : Constants<T> {
  T votes, mask_scale;
};

template <class T>
NEGMERGE_INLINE FamilyConstants<T> family_constants(const Batch& batch) {
  T votes{};
  for (std::int64_t k = 0; k < batch.n; ++k) votes = votes + static_cast<T>(batch.family->numbers[batch.n + k]);
  return {{static_cast<T>(batch.scale), static_cast<T>(batch.n), static_cast<T>(batch.required),
           static_cast<T>(batch.n - batch.required)},
          votes, static_cast<T>(batch.family->mask_scale)};
}

// What a Totals has besides the sum of all e_k, as bits: how many have each sign; sums and votes of each sign; the least and the
// greatest; the one of the largest magnitude.
enum Totalled : int { kTotalSum = 0, kTotalCounts = 1, kTotalSigns = 2, kTotalExtremes = 4, kTotalLargest = 8, kTotalAll = 15 };

// What an election and a reduction need. unanimous: all models must agree. Of MASKS, this is the totals before the masks.
NEGMERGE_INLINE constexpr int totals_of(Election election, Reduction reduction, bool unanimous) {
  const bool largest = reduction == kLargest;
  switch (election) {
    case kAgreement: return unanimous ? kTotalExtremes : kTotalCounts | (largest ? kTotalExtremes : kTotalSigns);
    case kSignOfSum: return largest ? kTotalExtremes : kTotalSigns;
    case kConflict: return kTotalExtremes | (largest ? kTotalLargest : kTotalSum);
    case kVotesCounted: return kTotalCounts | (largest ? kTotalLargest : kTotalSum);
    default: return largest ? kTotalLargest : kTotalSum;
  }
}

template <class N, bool kHas>
struct CountsOfSigns {
  N n_positive = N{}, n_negative = N{};
};
template <class N, bool kHas>
struct SumsOfSigns {
  N positive = N{}, negative = N{}, positive_votes = N{}, negative_votes = N{};
};
template <class T, class N, bool kHas>
struct ExtremesYet {
  static constexpr T kInf = T(__builtin_huge_val());
  N least = N{} + kInf, greatest = N{} - kInf;
};
template <class N, bool kHas>
struct LargestYet {
  N largest = N{};
};
template <class N>
struct CountsOfSigns<N, false> {};
template <class N>
struct SumsOfSigns<N, false> {};
template <class T, class N>
struct ExtremesYet<T, N, false> {};
template <class N>
struct LargestYet<N, false> {};

// Accumulates all e_k of an element, in the order of the models. If one is not finite, neither is the total.
template <class T, class N, int kTotalled>
struct Totals : CountsOfSigns<N, (kTotalled & kTotalCounts) != 0>,
               SumsOfSigns<N, (kTotalled & kTotalSigns) != 0>,
               ExtremesYet<T, N, (kTotalled & kTotalExtremes) != 0>,
               LargestYet<N, (kTotalled & kTotalLargest) != 0> {
  N total = N{};

  NEGMERGE_INLINE void accumulate(N e, [[maybe_unused]] N vote) {
    [[maybe_unused]] const N zero = N{}, one = N{} + T(1);
    total = total + e;
    if constexpr ((kTotalled & kTotalCounts) != 0) {
      this->n_positive = this->n_positive + (e > zero ? one : zero);
      this->n_negative = this->n_negative + (e < zero ? one : zero);
    }
    if constexpr ((kTotalled & kTotalSigns) != 0) {
      // Adding +0 for a model of the other sign changes no bit of a sum that started at +0.
      this->positive = this->positive + (e > zero ? e : zero);
      this->negative = this->negative + (e < zero ? e : zero);
      this->positive_votes = this->positive_votes + (e > zero ? vote : zero);
      this->negative_votes = this->negative_votes + (e < zero ? vote : zero);
    }
    if constexpr ((kTotalled & kTotalExtremes) != 0) {
      this->least = lesser(e, this->least);
      this->greatest = greater(e, this->greatest);
    }
    if constexpr ((kTotalled & kTotalLargest) != 0) this->largest = magnitude(e) < magnitude(this->largest) ? this->largest : e;
  }

  // r. Of MASKS, if at least two masks are set.
  NEGMERGE_INLINE N reduced(Election election, Reduction reduction, const FamilyConstants<T>& c) const {
    const N zero = N{};
    switch (election) {
      case kAgreement:
        if constexpr ((kTotalled & kTotalCounts) != 0) {
          const auto up = this->n_positive >= N{} + c.required, down = this->n_negative >= N{} + c.required;
          return (up | down) ? of_sign(up, reduction) : zero;
        } else if constexpr ((kTotalled & kTotalExtremes) != 0) {
          const auto up = this->least > zero, down = this->greatest < zero;
          if (reduction == kLargest) return (up | down) ? (up ? this->greatest : this->least) : zero;
          return (up | down) ? of_all(reduction, c) : zero;
        }
        return zero;
      case kSignOfSum: return of_sign(total >= zero, reduction);
      case kConflict:
        if constexpr ((kTotalled & kTotalExtremes) != 0)
          return ((this->least > zero) | (this->greatest < zero)) ? zero : of_all(reduction, c);
        return zero;
      case kVotesCounted:
        if constexpr ((kTotalled & kTotalCounts) != 0) {
          const auto up = (this->n_positive >= N{} + c.required) & (total > zero);
          const auto down = (this->n_negative >= N{} + c.required) & (total < zero);
          return (up | down) ? of_all(reduction, c) : zero;
        }
        return zero;
      default: return of_all(reduction, c);
    }
  }

  // Of AGREEMENT: whether zeros alone keep the models from agreeing, if all is finite.
  NEGMERGE_INLINE auto vetoed_by_zero(const FamilyConstants<T>& c) const {
    if constexpr ((kTotalled & kTotalCounts) != 0) {
      // Zeros may have the sign of the majority; only the models of the other sign dissent.
      return (lesser(this->n_positive, this->n_negative) <= N{} + c.dissenters) &
             (greater(this->n_positive, this->n_negative) < N{} + c.required);
    } else if constexpr ((kTotalled & kTotalExtremes) != 0) {
      return greater(-this->greatest, this->least) == N{};
    } else {
      return total != total;
    }
  }

  // What all e_k are reduced to.
  NEGMERGE_INLINE N of_all(Reduction reduction, const FamilyConstants<T>& c) const {
    if constexpr ((kTotalled & kTotalLargest) != 0)
      if (reduction == kLargest) return this->largest;
    if (reduction != kMean) return total;
    return c.votes == T(0) ? N{} : total / c.votes;
  }

  // What the e_k of one sign are reduced to. up: a flag, or a pack of flags.
  template <class Flag>
  NEGMERGE_INLINE N of_sign(Flag up, Reduction reduction) const {
    if constexpr ((kTotalled & kTotalExtremes) != 0)
      if (reduction == kLargest) return up ? this->greatest : this->least;
    if constexpr ((kTotalled & kTotalSigns) != 0) {
      const N sum = up ? this->positive : this->negative, votes = up ? this->positive_votes : this->negative_votes;
      if (reduction == kMean) return votes == N{} ? N{} : sum / votes;
      return sum;
    }
    return N{};
  }
};

// Of MASKS: how many are set, once the sum of all e_k is known.
template <class T, class N>
struct MaskTotals {
  N total, masks = N{};

  NEGMERGE_INLINE void accumulate(N e, const FamilyConstants<T>& c) {
    masks = masks + (magnitude(e) >= c.mask_scale * magnitude(total - e) ? N{} + T(1) : N{});
  }
  NEGMERGE_INLINE N reduced(N r) const { return masks >= N{} + T(2) ? r : N{}; }
};

// Philox4x32-10 (negmerge_fast/core/generator.py): the numbers of four elements from 4 · block on.
struct FourNumbers {
  std::uint32_t of[4];
};
NEGMERGE_INLINE FourNumbers philox(std::uint64_t seed, std::uint64_t block, std::uint32_t tensor, std::uint32_t model) {
  auto low = static_cast<std::uint32_t>(seed), high = static_cast<std::uint32_t>(seed >> 32);
  auto a = static_cast<std::uint32_t>(block), b = static_cast<std::uint32_t>(block >> 32);
  std::uint32_t c = tensor, d = model;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u) {
    const std::uint64_t first = std::uint64_t{0xD2511F53u} * a, second = std::uint64_t{0xCD9E8D57u} * c;
    a = static_cast<std::uint32_t>(second >> 32) ^ b ^ low;
    b = static_cast<std::uint32_t>(second);
    c = static_cast<std::uint32_t>(first >> 32) ^ d ^ high;
    d = static_cast<std::uint32_t>(first);
  }
  return {{a, b, c, d}};
}

// Terms of a segment: a row of Family::terms.
struct SegmentTerms {
  const std::int64_t* row;
  std::int64_t n;

  NEGMERGE_INLINE std::int64_t begin() const { return row[0]; }
  NEGMERGE_INLINE std::uint32_t key() const { return static_cast<std::uint32_t>(row[1]); }
  NEGMERGE_INLINE std::int64_t weights() const { return row[2]; }  // their address, or 0
  NEGMERGE_INLINE int weight_type() const { return static_cast<int>(row[3]); }
  NEGMERGE_INLINE std::int64_t weight_size() const { return kWeightSizes[row[3]]; }
  NEGMERGE_INLINE double low(std::int64_t k) const { return number(4 + k); }
  NEGMERGE_INLINE double high(std::int64_t k) const { return number(4 + n + k); }

 private:
  NEGMERGE_INLINE double number(std::int64_t at) const {
    double value;
    memcpy(&value, row + at, sizeof value);
    return value;
  }
};
NEGMERGE_INLINE SegmentTerms terms_of(const Batch& batch, std::int64_t segment) {
  return {batch.family->terms + segment * (4 + 2 * batch.n), batch.n};
}

// Whether a gate lets d_k pass. element: of the segment.
template <class T>
NEGMERGE_INLINE bool passes(const Family& family, const SegmentTerms& terms, std::int64_t k, std::int64_t element, T d) {
  if (family.gate == kMagnitude) {
    const T size = magnitude(d);
    return static_cast<T>(terms.low(k)) <= size && size <= static_cast<T>(terms.high(k));
  }
  if (family.gate == kRandom) {
    const std::int64_t i = terms.begin() + element;
    const FourNumbers numbers = philox(family.seed, i / 4, terms.key(), static_cast<std::uint32_t>(k));
    return numbers.of[i % 4] < static_cast<std::uint64_t>(family.numbers[2 * terms.n + k]);
  }
  return true;
}

// r of an element, whether every p_k is finite, and whether it is vetoed by zero if all is finite.
template <class T>
struct Reduced {
  T r;
  bool finite, vetoed;
};

// Reduces one element by any choices. difference(k) is d_k.
template <class T, class Difference>
NEGMERGE_INLINE Reduced<T> reduce_one(const Family& family, const SegmentTerms& terms, std::int64_t element,
                                      const FamilyConstants<T>& c, const Difference& difference) {
  Totals<T, T, kTotalAll> totals;
  bool finite = true;
  const auto each = [&](std::int64_t k) {
    const T d = difference(k), p = static_cast<T>(family.numbers[k]) * d;
    finite &= p - p == T(0);
    return passes(family, terms, k, element, d) ? p : T(0);
  };
  for (std::int64_t k = 0; k < terms.n; ++k) totals.accumulate(each(k), static_cast<T>(family.numbers[terms.n + k]));
  T r = totals.reduced(family.election, family.reduction, c);
  if (family.election == kMasks) {
    MaskTotals<T, T> masks{totals.total};
    for (std::int64_t k = 0; k < terms.n; ++k) masks.accumulate(each(k), c);
    r = masks.reduced(r);
  }
  return {r, finite, family.election == kAgreement && totals.vetoed_by_zero(c)};
}

// An element's bits to store, and whether it was changed, everything was finite, it was vetoed by zero, and a weight of zero kept it.
template <class Bits>
struct FamilyOutcome {
  Bits bits;
  bool agreed, finite, vetoed, masked;
};

// Finishes one element. S: the storage type of base and output. w: its weight; 1 if there is none.
template <class S, class T>
NEGMERGE_INLINE FamilyOutcome<typename S::Bits> finish_family(typename S::Bits base, const Reduced<T>& reduced, T w,
                                                              const FamilyConstants<T>& c) {
  using Float = typename S::Float;
  using Word = typename S::Word;
  const T b = static_cast<T>(S::template widen<Float>(static_cast<Word>(base)));
  const T weighted = w * reduced.r;
  const Float result = static_cast<Float>(negated_mean(b, weighted, c));  // from double to 16 bits by way of float
  const bool chosen = weighted != T(0);
  const bool finite =
      reduced.finite && b - b == T(0) && weighted - weighted == T(0) && (!chosen || in_range<S>(result));
  if (chosen && finite) return {static_cast<typename S::Bits>(S::template round<Word>(result)), true, true, false, false};
  return {base, false, finite, finite && reduced.vetoed, finite && reduced.r != T(0) && w == T(0)};
}

}  // namespace negmerge
