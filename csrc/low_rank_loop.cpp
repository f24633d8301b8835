// Low-rank differences of a rectangle, on one thread. Compiled once for each instruction set (CMakeLists.txt).
//
// A few rows times a few packs of columns are summed in registers: each pack of right factors that is loaded serves all of the rows,
// each left factor all of the columns. Right factors are copied together first: rows of a large matrix lie at distances at which
// they would push each other out of the first-level cache.
#include "low_rank.h"

#include <algorithm>

#include "dtypes.h"
#include "packs.h"

// Code for one instruction set must never be linked in place of the same code for another, so that only the loop itself has
// external linkage.
namespace negmerge {
namespace {

constexpr int kRows = 4;
constexpr std::int64_t kLine = 64;
constexpr std::int64_t kAhead = 2048;  // bytes: left factors so far away are fetched
#if defined(__AVX512F__)
constexpr int kPacks = 4;
#else
constexpr int kPacks = 2;  // there are 16 registers
#endif

// Where d itself is written.
struct Difference {};

template <class T>
using Pack = typename Lanes<T>::N;

// Bits of a number that storage type S has no finite number for.
template <class S, class F>
typename S::Bits bits_beyond(F x) {
  constexpr auto infinity = ((std::uint64_t{1} << S::kExponent) - 1) << S::kFraction;
  const std::uint64_t sign = std::uint64_t{std::signbit(x)} << (S::kExponent + S::kFraction);
  return static_cast<typename S::Bits>(x == x ? infinity | sign : infinity | std::uint64_t{1} << (S::kFraction - 1));
}

// Rounds to storage type S, one by one. Infinities and NaN, too.
template <class S, class F, class N>
__attribute__((noinline)) void store_each(char* to, const N& x) {
  F each[sizeof(N) / sizeof(F)];
  memcpy(each, &x, sizeof x);
  for (const F number : each) {
    const auto bits = in_range<S>(number) ? static_cast<typename S::Bits>(S::template round<typename S::Word>(number))
                                          : bits_beyond<S>(number);
    memcpy(to, &bits, sizeof bits);
    to += sizeof bits;
  }
}

// Writes a pack: d, or b + d rounded to type S.
template <class T, class S>
NEGMERGE_INLINE void write(Pack<T> d, const char* base, char* out) {
  if constexpr (std::is_same_v<S, Difference>) {
    store(out, d, false);
  } else {
    using F = typename Lanes<T>::template Of<typename S::Float>;
    using Word = typename Lanes<T>::template Of<typename S::Word>;
    using Bits = typename Lanes<T>::template Of<typename S::Bits>;
    const Pack<T> b = convert<Pack<T>>(load_floats<S, F, Word, Bits>(base));
    const F x = convert<F>(b + d);
    if constexpr (sizeof(typename S::Bits) == sizeof(typename S::Float)) store(out, x, false);
    else if (__builtin_expect(all_negative(in_range<S>(x)), 1)) store(out, rounded_bits<S, Bits, Word>(x), false);
    else store_each<S, typename S::Float>(out, x);
  }
}

template <class T, class S>
constexpr std::int64_t kSize = sizeof(typename S::Bits);
template <class T>
constexpr std::int64_t kSize<T, Difference> = sizeof(T);

// An address that may be null.
NEGMERGE_INLINE const char* moved(const char* address, std::int64_t bytes) { return address ? address + bytes : nullptr; }

// Writes the first `columns` elements of a row that is in packs.
template <class T, class S>
__attribute__((noinline)) void write_some(const Pack<T>* d, const char* base, char* out, std::int64_t columns) {
  constexpr std::int64_t lanes = Lanes<T>::lanes;
  for (; columns > 0; ++d, columns -= lanes) {
    const std::int64_t size = std::min(columns, lanes) * kSize<T, S>;
    char from[lanes * kSize<T, S>] = {}, to[sizeof from];
    if (base) memcpy(from, base, size);
    write<T, S>(*d, from, to);
    memcpy(out, to, size);
    base = moved(base, size);
    out += size;
  }
}

// Writes kOf rows of as many columns as kPacks packs have, or `columns`, if these are fewer. left: of the first row.
template <class T, class S, int kOf>
NEGMERGE_INLINE void expand_block(const char* left, const char* right, std::int64_t right_stride, std::int64_t rank, T scale,
                                  const Target& to, std::int64_t columns) {
  constexpr std::int64_t lanes = Lanes<T>::lanes, bytes = lanes * kSize<T, S>;
  Pack<T> sum[kOf][kPacks] = {};
  for (std::int64_t r = 0; r < rank; ++r, right += right_stride, left += sizeof(T)) {
    Pack<T> factors[kPacks];
#pragma GCC unroll 8
    for (int j = 0; j < kPacks; ++j) factors[j] = read<Pack<T>>(right + j * kPackBytes);
#pragma GCC unroll 8
    for (int i = 0; i < kOf; ++i) {
      const T factor = read<T>(left + i * rank * static_cast<std::int64_t>(sizeof(T)));
#pragma GCC unroll 8
      for (int j = 0; j < kPacks; ++j) sum[i][j] = sum[i][j] + factor * factors[j];
    }
  }
  const bool whole = columns >= kPacks * lanes;
#pragma GCC unroll 8
  for (int i = 0; i < kOf; ++i) {
    const char* base = moved(to.base, i * to.base_stride);
    char* out = to.out + i * to.out_stride;
#pragma GCC unroll 8
    for (int j = 0; j < kPacks; ++j) sum[i][j] = scale * sum[i][j];
    if (__builtin_expect(whole, 1)) {
#pragma GCC unroll 8
      for (int j = 0; j < kPacks; ++j) write<T, S>(sum[i][j], moved(base, j * bytes), out + j * bytes);
    } else {
      // A copy, so that the sums themselves need no memory.
      Pack<T> d[kPacks];
      for (int j = 0; j < kPacks; ++j) d[j] = sum[i][j];
      write_some<T, S>(d, base, out, columns);
    }
  }
}

// Writes `rows` rows of at most kPanel bytes of columns. right: of all these columns, or zeros behind them.
template <class T, class S>
void expand_panel(const char* left, const char* right, std::int64_t right_stride, std::int64_t rank, T scale, const Target& target,
                  std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t most = kPacks * Lanes<T>::lanes;
  for (std::int64_t i = 0; i < rows; i += kRows) {
    const std::int64_t row_bytes = rank * static_cast<std::int64_t>(sizeof(T));
    const char* lefts = left + i * row_bytes;
    for (std::int64_t at = 0; at < kRows * row_bytes; at += kLine) __builtin_prefetch(lefts + kAhead + at);
    for (std::int64_t m = 0; m < columns; m += most) {
      const char* rights = right + m * static_cast<std::int64_t>(sizeof(T));
      Target to = target;
      to.base = moved(to.base, i * to.base_stride + m * kSize<T, S>);
      to.out += i * to.out_stride + m * kSize<T, S>;
      switch (rows - i) {
        case 1: expand_block<T, S, 1>(lefts, rights, right_stride, rank, scale, to, columns - m); break;
        case 2: expand_block<T, S, 2>(lefts, rights, right_stride, rank, scale, to, columns - m); break;
        case 3: expand_block<T, S, 3>(lefts, rights, right_stride, rank, scale, to, columns - m); break;
        default: expand_block<T, S, kRows>(lefts, rights, right_stride, rank, scale, to, columns - m);
      }
    }
  }
}

template <class T, class S>
void expand_rectangle(const Expansion& e, const Rectangle& rectangle, const Target& target, const Panels& panels) {
  constexpr std::int64_t size = sizeof(T), most = kPanel / size;
  const T scale = static_cast<T>(e.scale);
  const bool in_panels = are_in_panels(e, size, rectangle.column);
  // Rows of one matrix at a time.
  for (std::int64_t i = 0, rows; i < rectangle.rows; i += rows) {
    const std::int64_t row = rectangle.row + i, matrix = row / e.rows;
    rows = std::min(rectangle.rows - i, (matrix + 1) * e.rows - row);
    const char* left = e.left + row * e.rank * size;
    for (std::int64_t m = 0; m < rectangle.columns; m += most) {
      const std::int64_t columns = std::min(rectangle.columns - m, most);
      const char* right = e.right + (matrix * e.rank * e.columns + rectangle.column + m) * size;
      std::int64_t stride = e.columns * size;
      if (in_panels) {
        right = e.panels + (matrix * ((e.columns + most - 1) / most) + (rectangle.column + m) / most) * e.rank * kPanel;
        stride = kPanel;
      } else if (panels.are_there || rows > kRows || columns < most) {
        right = panels.memory + (panels.are_there ? m / most * e.rank * kPanel : 0);
        stride = kPanel;
        if (!panels.are_there) pack_panels(e, size, matrix, rectangle.column + m, columns, panels.memory);
      }
      Target to = target;
      to.base = moved(to.base, i * to.base_stride + m * kSize<T, S>);
      to.out += i * to.out_stride + m * kSize<T, S>;
      expand_panel<T, S>(left, right, stride, e.rank, scale, to, rows, columns);
    }
  }
}

template <class T>
void expand_as(const Expansion& e, Dtype written, const Rectangle& rectangle, const Target& target, const Panels& panels) {
  if (!target.base) return expand_rectangle<T, Difference>(e, rectangle, target, panels);
  with_type<T>(written, [&](auto type) { expand_rectangle<T, decltype(type)>(e, rectangle, target, panels); });
}

}  // namespace

void NEGMERGE_LOW_RANK_LOOP(const Expansion& e, bool is_double, Dtype written, const Rectangle& rectangle, const Target& target,
                            const Panels& panels) {
  is_double ? expand_as<double>(e, written, rectangle, target, panels) : expand_as<float>(e, written, rectangle, target, panels);
}

}  // namespace negmerge
