// The rule of NegMerge for one element, for host and device: read this first.
//
//     d_k   = x_k - b                        (b rounded to the type of x_k; or x_k itself, of task vectors)
//     agree = all d_k > 0  or  all d_k < 0
//     out   = b - λ · (d_1 + … + d_n) / n    if agree,   else b
//
// N is a number of the arithmetic type T (float or double), or a pack of them. GCC's vectors have the same operators, but
// comparing two packs gives a mask, not a bool. negmerge_fast/core/rule.py says the rule to the bit. Compiled without fused
// multiply-adds and without fast-math. Nothing here allocates or fails.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define NEGMERGE_INLINE __host__ __device__ __forceinline__
#else
#define NEGMERGE_INLINE inline __attribute__((always_inline))
#endif

namespace negmerge {

// Parameters of the rule in the arithmetic type. n: models; required: how many of them must agree on the sign; dissenters: how
// many need not.
template <class T>
struct Constants {
  T scale, n, required, dissenters;
};

// The lesser and the greater of x and a known number. If x is NaN the known one stays. Of two zeros, either.
template <class N>
NEGMERGE_INLINE N lesser(N x, N known) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(N) == 4) return fminf(x, known);
#endif
  return x < known ? x : known;
}
template <class N>
NEGMERGE_INLINE N greater(N x, N known) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(N) == 4) return fmaxf(x, known);
#endif
  return x > known ? x : known;
}

// Accumulates all d_k of an element, in the order of the models.
//
// least and greatest ignore a NaN; the sum propagates it. The sum is NaN also after infinities of both signs, and at least
// one of these is a d_k. So some d_k is not finite exactly when the sum is NaN or least or greatest is infinite.
template <class T, class N>
struct Unanimous {
  static constexpr T kInf = T(__builtin_huge_val());
  using OfOne = Unanimous<T, T>;  // the accumulator of a single element
  // If the result is finite, so are the sum, b and every d_k: a quick test with false alarms.
  static constexpr bool kResultTells = true;
  N sum = N{}, least = N{} + kInf, greatest = N{} - kInf;

  // start of a finite d_k, in fewer instructions.
  NEGMERGE_INLINE void begin(N d) { sum = least = greatest = d; }
  NEGMERGE_INLINE void accumulate(N d) {
    sum = sum + d;
    least = lesser(d, least);
    greatest = greater(d, greatest);
  }
  NEGMERGE_INLINE void start(N d) {
    *this = {};
    accumulate(d);
  }
  NEGMERGE_INLINE auto finite() const { return (sum == sum) & (least > N{} - kInf) & (greatest < N{} + kInf); }
  // Above zero if all d_k have one sign, zero if some are zero and the others have one sign, below zero otherwise.
  NEGMERGE_INLINE N unity() const { return greater(-greatest, least); }
  NEGMERGE_INLINE auto agree(const Constants<T>&) const { return unity() > N{}; }
  // Whether zeros alone keep the models from agreeing, if all is finite.
  NEGMERGE_INLINE auto vetoed_by_zero(const Constants<T>&) const { return unity() == N{}; }
  NEGMERGE_INLINE N mean(const Constants<T>& c) const { return sum / c.n; }
};

// The same for min_agreement below 1: the mean is over the models that agree.
template <class T, class N>
struct Majority : Unanimous<T, N> {
  static constexpr bool kResultTells = false;
  using OfOne = Majority<T, T>;
  N positive = N{}, negative = N{}, n_positive = N{}, n_negative = N{};

  NEGMERGE_INLINE void begin(N d) {
    Unanimous<T, N>::begin(d);
    accumulate_signs(d);
  }
  NEGMERGE_INLINE void accumulate(N d) {
    Unanimous<T, N>::accumulate(d);
    accumulate_signs(d);
  }
  NEGMERGE_INLINE void accumulate_signs(N d) {
    const N zero = N{}, one = N{} + T(1);
    // Adding +0 for a model of the other sign changes no bit of a sum that started at +0.
    positive = positive + (d > zero ? d : zero);
    negative = negative + (d < zero ? d : zero);
    n_positive = n_positive + (d > zero ? one : zero);
    n_negative = n_negative + (d < zero ? one : zero);
  }
  NEGMERGE_INLINE void start(N d) {
    *this = {};
    accumulate(d);
  }
  NEGMERGE_INLINE auto agree(const Constants<T>& c) const {
    return (n_positive >= N{} + c.required) | (n_negative >= N{} + c.required);
  }
  NEGMERGE_INLINE auto vetoed_by_zero(const Constants<T>& c) const {
    // Zeros may have the sign of the majority; only the models of the other sign dissent.
    return (lesser(n_positive, n_negative) <= N{} + c.dissenters) & (greater(n_positive, n_negative) < N{} + c.required);
  }
  NEGMERGE_INLINE N mean(const Constants<T>& c) const {
    const auto up = n_positive >= N{} + c.required;
    return (up ? positive : negative) / (up ? n_positive : n_negative);
  }
};

// Unanimous for packs whose results are finite, and for d_k that are never -0. As integers, the bits of such numbers have the same
// signs, and more units of a processor compare those. Order says as what packs are compared (of),
// and has their unity.
template <class T, class N, class Order>
struct OneSign {
  static constexpr bool kResultTells = true;
  using OfOne = Unanimous<T, T>;
  using Ordered = typename Order::Ordered;
  N sum;
  Ordered least, greatest;

  NEGMERGE_INLINE void start(N d) {
    sum = d;
    least = greatest = Order::of(d);
  }
  NEGMERGE_INLINE void accumulate(N d) {
    sum = sum + d;
    least = lesser(Order::of(d), least);
    greatest = greater(Order::of(d), greatest);
  }
  // As Unanimous says.
  NEGMERGE_INLINE auto unity() const { return Order::unity(least, greatest); }
  NEGMERGE_INLINE auto agree(const Constants<T>&) const { return unity() > decltype(unity()){}; }
  NEGMERGE_INLINE auto vetoed_by_zero(const Constants<T>&) const { return unity() == decltype(unity()){}; }
  NEGMERGE_INLINE N mean(const Constants<T>& c) const { return sum / c.n; }
};

// The result where the models agree, before it is rounded to storage.
template <class T, class N>
NEGMERGE_INLINE N negated_mean(N b, N mean, const Constants<T>& c) {
  return b - c.scale * mean;  // the bits of b + λ · (-mean)
}
template <class T, class N, class Accumulator>
NEGMERGE_INLINE N negated(N b, const Accumulator& accumulator, const Constants<T>& c) {
  return negated_mean(b, accumulator.mean(c), c);
}

// |x|; of a pack, without a comparison.
template <class N>
NEGMERGE_INLINE N magnitude(N x) {
  using Mask = decltype(x < x);
  if constexpr (sizeof(Mask) != sizeof(N)) {
    return std::fabs(x);
  } else {
    return (N)((Mask)x & ~(Mask)-N{});
  }
}

// Whether a result is finite after rounding to storage.
template <class S, class F>
NEGMERGE_INLINE auto in_range(F x) {
  return magnitude(x) < F{} + S::kOverflow;
}

// Whether storage type M holds every value of S.
template <class M, class S>
constexpr bool kHolds = M::kExponent >= S::kExponent && M::kFraction >= S::kFraction;

// A number as storage type M holds it: rounded, and widened again. In M's range and beyond, where it is infinite or NaN.
// Where M does not hold every value of the base's type, d_k subtracts the base so rounded.
template <class M, class Word, class F>
NEGMERGE_INLINE F as_stored(F x) {
  return in_range<M>(x) ? M::template widen<F>(M::template round<Word>(x)) : x * (F{} + __builtin_huge_valf());
}

// An element's bits to store, whether it agreed, whether everything was finite, and whether it was vetoed by zero.
template <class Bits>
struct Outcome {
  Bits bits;
  bool agreed, finite, vetoed;
};

// Finishes one element. S: the storage type of base and output (dtypes.h).
template <class S, class T, class Accumulator>
NEGMERGE_INLINE Outcome<typename S::Bits> finish(typename S::Bits base, const Accumulator& accumulator, const Constants<T>& c) {
  using Float = typename S::Float;
  using Word = typename S::Word;
  const T b = static_cast<T>(S::template widen<Float>(static_cast<Word>(base)));
  const Float result = static_cast<Float>(negated(b, accumulator, c));  // from double to 16 bits by way of float
  const bool agree = accumulator.agree(c);
  const bool finite = accumulator.finite() && b - b == T(0) && (!agree || in_range<S>(result));
  if (agree && finite) return {static_cast<typename S::Bits>(S::template round<Word>(result)), true, true, false};
  return {base, false, finite, finite && accumulator.vetoed_by_zero(c)};
}

}  // namespace negmerge
