// The floor of the CPU kernel: the rule as plain loops over elements in AVX2, for finite inputs, with all values in registers from
// the first load to the store; and beside it csrc/merge_loop.cpp. plain_loop.py builds and runs it, on one thread.
// Arguments: models, storage type (0 F64, 1 F32, 2 F16, 3 BF16), elements, 1 for in place, rounds, calls of each round.
// Prints whether the bits and counts are the same, then a line for each round: seconds of a call of the floor and of each kernel.
#include <immintrin.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/merge_loop.h"

namespace negmerge {
void merge_loop(const Batch&, Position, std::int64_t, bool);
}  // namespace negmerge
using namespace negmerge;

namespace {

// Two packs of a type: loaded from 64 bytes (F32, F64) or 32, and stored in the same order.
struct Float {
  using N = __m256;
  static N set(double x) { return _mm256_set1_ps(static_cast<float>(x)); }
  static N sub(N a, N b) { return _mm256_sub_ps(a, b); }
  static N add(N a, N b) { return _mm256_add_ps(a, b); }
  static N mul(N a, N b) { return _mm256_mul_ps(a, b); }
  static N div(N a, N b) { return _mm256_div_ps(a, b); }
  static N bxor(N a, N b) { return _mm256_xor_ps(a, b); }
  static N band(N a, N b) { return _mm256_and_ps(a, b); }
  static N min(N a, N b) { return _mm256_min_ps(a, b); }
  static N positive(N a) { return _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GT_OQ); }
  static N blend(N no, N yes, N mask) { return _mm256_blendv_ps(no, yes, mask); }
  static __m256i less(__m256i count, N mask) { return _mm256_sub_epi32(count, _mm256_castps_si256(mask)); }
};

struct PlainF32 : Float {
  static constexpr int kBytes = 64, kElements = 16;
  static void load(const char* from, N& a, N& b) {
    a = _mm256_loadu_ps(reinterpret_cast<const float*>(from));
    b = _mm256_loadu_ps(reinterpret_cast<const float*>(from) + 8);
  }
  static void store(char* to, N a, N b) {
    _mm256_storeu_ps(reinterpret_cast<float*>(to), a);
    _mm256_storeu_ps(reinterpret_cast<float*>(to) + 8, b);
  }
};

struct PlainBF16 : Float {
  static constexpr int kBytes = 32, kElements = 16;
  // Even and odd elements.
  static void load(const char* from, N& a, N& b) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static __m256i rounded(N x) {
    const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  }
  static void store(char* to, N a, N b) {
    const __m256i both = _mm256_blend_epi16(_mm256_srli_epi32(rounded(a), 16), rounded(b), 0xaa);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), both);
  }
};

struct PlainF16 : Float {
  static constexpr int kBytes = 32, kElements = 16;
  static void load(const char* from, N& a, N& b) {
    a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + 1));
  }
  static void store(char* to, N a, N b) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to) + 1, _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
  }
};

struct PlainF64 {
  using N = __m256d;
  static constexpr int kBytes = 64, kElements = 8;
  static N set(double x) { return _mm256_set1_pd(x); }
  static N sub(N a, N b) { return _mm256_sub_pd(a, b); }
  static N add(N a, N b) { return _mm256_add_pd(a, b); }
  static N mul(N a, N b) { return _mm256_mul_pd(a, b); }
  static N div(N a, N b) { return _mm256_div_pd(a, b); }
  static N bxor(N a, N b) { return _mm256_xor_pd(a, b); }
  static N band(N a, N b) { return _mm256_and_pd(a, b); }
  static N min(N a, N b) { return _mm256_min_pd(a, b); }
  static N positive(N a) { return _mm256_cmp_pd(a, _mm256_setzero_pd(), _CMP_GT_OQ); }
  static N blend(N no, N yes, N mask) { return _mm256_blendv_pd(no, yes, mask); }
  static __m256i less(__m256i count, N mask) { return _mm256_sub_epi64(count, _mm256_castpd_si256(mask)); }
  static void load(const char* from, N& a, N& b) {
    a = _mm256_loadu_pd(reinterpret_cast<const double*>(from));
    b = _mm256_loadu_pd(reinterpret_cast<const double*>(from) + 4);
  }
  static void store(char* to, N a, N b) {
    _mm256_storeu_pd(reinterpret_cast<double*>(to), a);
    _mm256_storeu_pd(reinterpret_cast<double*>(to) + 4, b);
  }
};

// Of one pack: the sum, the sign of the first difference, and the least of all differences with it.
template <class P>
struct Plain {
  using N = typename P::N;
  N b, sum, sign, least;
  void first(N d) {
    sum = d;
    sign = P::band(d, P::set(-0.0));
    least = P::bxor(d, sign);
  }
  void next(N d) {
    sum = P::add(sum, d);
    least = P::min(P::bxor(d, sign), least);
  }
  // The sum is divided where a multiplication would give other bits.
  template <int n>
  N finish(N scale, __m256i& agreed) const {
    const N mean = (n & (n - 1)) ? P::div(sum, P::set(n)) : P::mul(sum, P::set(1.0 / n));
    const N agree = P::positive(least);
    agreed = P::less(agreed, agree);
    return P::blend(b, P::sub(b, P::mul(scale, mean)), agree);
  }
};

// Returns the number of elements that agreed; they fit 32 bits for each place of a pack.
template <class P, int n>
__attribute__((noinline)) std::int64_t plain_loop(const std::int64_t* row, double scale) {
  using N = typename P::N;
  const char* x[n];
  for (int k = 0; k < n; ++k) x[k] = reinterpret_cast<const char*>(row[3 + k]);
  const char* base = reinterpret_cast<const char*>(row[1]);
  char* out = reinterpret_cast<char*>(row[2]);
  const N factor = P::set(scale);
  __m256i agreed = _mm256_setzero_si256();
  const std::int64_t end = row[0] / P::kElements * P::kBytes;
  for (std::int64_t at = 0; at < end; at += P::kBytes) {
    Plain<P> a, b;
    P::load(base + at, a.b, b.b);
#pragma GCC unroll 32
    for (int k = 0; k < n; ++k) {
      N left, right;
      P::load(x[k] + at, left, right);
      left = P::sub(left, a.b), right = P::sub(right, b.b);
      if (k) a.next(left), b.next(right);
      else a.first(left), b.first(right);
    }
    const N left = a.template finish<n>(factor, agreed), right = b.template finish<n>(factor, agreed);
    P::store(out + at, left, right);
  }
  std::int64_t found = 0;
  if (sizeof(N) / sizeof(P::set(0)[0]) == 4) for (int i = 0; i < 4; ++i) found += agreed[i];
  else for (int i = 0; i < 8; ++i) found += reinterpret_cast<const std::int32_t*>(&agreed)[i];
  return found;
}

using Plainly = std::int64_t (*)(const std::int64_t*, double);
template <class P>
Plainly plain_loop(int n) {
  switch (n) {
    case 2: return plain_loop<P, 2>;
    case 3: return plain_loop<P, 3>;
    case 8: return plain_loop<P, 8>;
    case 16: return plain_loop<P, 16>;
    case 30: return plain_loop<P, 30>;
  }
  std::abort();
}

template <class Task>
double seconds(int calls, Task task) {
  const auto began = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) task();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count() / calls;
}

}  // namespace

int main(int, char** argument) {
  const int n = std::atoi(argument[1]), calls = std::atoi(argument[6]);
  const auto dtype = static_cast<Dtype>(std::atoi(argument[2]));
  const std::int64_t elements = std::atoll(argument[3]), size = kSizes[dtype];
  const bool in_place = std::atoi(argument[4]);
  const Plainly plain = dtype == kF64   ? plain_loop<PlainF64>(n)
                        : dtype == kF32 ? plain_loop<PlainF32>(n)
                        : dtype == kF16 ? plain_loop<PlainF16>(n)
                                        : plain_loop<PlainBF16>(n);
  std::vector<char*> operands;
  unsigned random = 1;
  for (int k = 0; k < n + 2; ++k) {
    operands.push_back(static_cast<char*>(std::aligned_alloc(4096, (elements * size + 4096 + 4095) / 4096 * 4096)) + k * 192 % 4096);
    for (std::int64_t i = 0; i < elements; ++i) {
      random = random * 1664525u + 1013904223u;
      // A base of 2 to 4. A third of the elements agree.
      const bool upper = k && i % 3 == 0;
      const std::uint32_t fraction = upper ? random >> 11 | 0x100000 : k ? random >> 9 : random >> 11;
      const float x = 2.0f + static_cast<float>(fraction & 0x7fffff) * 0x1p-22f;
      if (size == 8) reinterpret_cast<double*>(operands[k])[i] = x;
      if (size == 4) reinterpret_cast<float*>(operands[k])[i] = x;
      if (dtype == kF16) reinterpret_cast<std::uint16_t*>(operands[k])[i] = static_cast<std::uint16_t>(0x4000 | (fraction >> 13 & 0x3ff));
      if (dtype == kBF16) reinterpret_cast<std::uint16_t*>(operands[k])[i] = static_cast<std::uint16_t>(0x4000 | (fraction >> 16 & 0x7f));
    }
  }
  std::vector<std::int64_t> row{elements};
  for (const char* operand : operands) row.push_back(reinterpret_cast<std::int64_t>(operand));
  const std::vector<Dtype> dtypes(n, dtype);
  std::int64_t counts[kCounted] = {};
  // In place everything is merged again and again: with a scale this small the base stays what it is, and finite.
  const Batch batch{dtype, dtypes.data(), n, false, in_place ? 1e-30 : 0.9, n, 1, row.data(), counts};

  std::vector<char> expected(elements * size);
  const std::int64_t agreed = plain(row.data(), batch.scale);
  std::memcpy(expected.data(), operands[1], expected.size());
  if (in_place) row[2] = row[1];
  const auto check = [&](Loop loop) {
    counts[0] = 0;
    if (!in_place) std::memset(operands[1], 0, expected.size());
    loop(batch, {0, 0}, elements, true);
    const bool same = agreed == counts[0] && !std::memcmp(expected.data(), reinterpret_cast<char*>(row[2]), expected.size());
    std::printf(same ? "same\n" : "%lld elements agreed, expected %lld, or other bits\n", static_cast<long long>(counts[0]),
                static_cast<long long>(agreed));
  };
  check(merge_loop);
  std::int64_t seen = 0;
  for (int round = std::atoi(argument[5]); round > 0; --round) {
    std::printf("%.9f", seconds(calls, [&] { seen += plain(row.data(), batch.scale); }));
    std::printf(" %.9f", seconds(calls, [&] { merge_loop(batch, {0, 0}, elements, true); }));
    std::printf("\n");
  }
  return seen == -1;
}
