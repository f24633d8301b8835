// Magnitudes of differences over consecutive elements, on one thread. Compiled once for each instruction set (CMakeLists.txt).
//
// A tile's base is loaded once for all models. Comparisons of 64 magnitudes become words of bits; only of the few that are in an interval,
// one is handled after the other.
#include <type_traits>
#include <vector>

#include "arithmetic.h"
#include "magnitudes.h"
#include "tile_numbers.h"

namespace negmerge {
namespace {

// Elements of a tile: its base stays in the first-level cache.
constexpr int kTile = 2048, kWord = 64, kLine = 64;

// The intervals of a segment and a model, and what is found in them.
template <class T>
struct Search {
  T edges[kEdges];
  bool collects[kEdges / 2];
  std::int64_t lower[kEdges];
  T *found, *first;

  Search(const double* given, T* found) : lower{}, found(found), first(found) {
    using Key = std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>;
    for (int i = 0; i < kEdges; ++i) edges[i] = static_cast<T>(given[i]);
    // The bits of numbers that are not negative are in their order.
    for (int w = 0; w < kEdges / 2; ++w) collects[w] = bits_as<Key>(edges[2 * w + 1]) - bits_as<Key>(edges[2 * w]) > 1;
  }

  // Whether there is a second interval.
  bool is_double() const { return edges[kEdges - 1] > 0; }

  void write(std::int64_t* counts) const {
    for (int i = 0; i < kEdges; ++i) counts[i] = lower[i];
    counts[kEdges] = found - first;
  }
};

// Whether a pack of magnitudes is below an edge, a bit for each.
template <class N, class T>
NEGMERGE_INLINE Word flags_below(N magnitudes, T edge) {
  return bits_of(magnitudes < N{} + edge);
}

// What one interval of a tile is made of, in registers.
template <class T>
struct Edges {
  T low, high;
  Word collects;  // all bits, or none
  std::int64_t under_low = 0, under_high = 0;

  Edges(const Search<T>& search, int w)
      : low(search.edges[2 * w]), high(search.edges[2 * w + 1]), collects(search.collects[w] ? ~Word{0} : 0) {}

  void add_to(Search<T>& search, int w) const {
    search.lower[2 * w] += under_low;
    search.lower[2 * w + 1] += under_high;
  }
};

// Writes the magnitudes of set bits, and returns where the next ones are written.
template <class T>
NEGMERGE_INLINE T* collect(const T* magnitudes, Word inside, T* to) {
  const int count = __builtin_popcountll(inside);
  if (__builtin_expect(count > kSpare, 0)) {
    for (; inside; inside &= inside - 1) *to++ = magnitudes[__builtin_ctzll(inside)];
    return to;
  }
  // How many there are cannot be predicted: always as many are written.
  for (int i = 0; i < kSpare; ++i, inside &= inside - 1) to[i] = magnitudes[__builtin_ctzll(inside | Word{1} << 63)];
  return to + count;
}

// Measures 64 elements of storage type M, of which those in `valid` count.
template <class T, class M, bool kTwo>
NEGMERGE_INLINE T* measure_word(const char* x, const T* origin, Word valid, Edges<T>& first, Edges<T>& second, T* to) {
  using N = typename Lanes<T>::N;
  constexpr int lanes = Lanes<T>::lanes;
  T magnitudes[kWord];
  Word low = 0, high = 0, second_low = 0, second_high = 0;
#pragma GCC unroll 16
  for (int lane = 0; lane < kWord; lane += lanes) {
    N b;
    memcpy(&b, origin + lane, sizeof b);
    const N found = magnitude(load<T, M>(x + lane * sizeof(typename M::Bits)) - b);
    memcpy(magnitudes + lane, &found, sizeof found);
    low |= flags_below(found, first.low) << lane;
    high |= flags_below(found, first.high) << lane;
    if constexpr (kTwo) {
      second_low |= flags_below(found, second.low) << lane;
      second_high |= flags_below(found, second.high) << lane;
    }
  }
  first.under_low += __builtin_popcountll(low & valid);
  first.under_high += __builtin_popcountll(high & valid);
  Word inside = high & ~low & first.collects;
  if constexpr (kTwo) {
    second.under_low += __builtin_popcountll(second_low & valid);
    second.under_high += __builtin_popcountll(second_high & valid);
    inside |= second_high & ~second_low & second.collects;
  }
  return collect(magnitudes, inside & valid, to);
}

template <class T, class M, bool kTwo>
__attribute__((noinline)) void measure_tile(const char* x, const T* origin, int size, Search<T>& search) {
  constexpr int bytes = sizeof(typename M::Bits);
  Edges<T> first(search, 0), second(search, 1);
  T* to = search.found;
  int i = 0;
  for (; i + kWord <= size; i += kWord) {
    for (int line = 0; line < kWord * bytes; line += kLine) __builtin_prefetch(x + (i + kTile) * bytes + line, 0, 2);
    to = measure_word<T, M, kTwo>(x + i * bytes, origin + i, ~Word{0}, first, second, to);
  }
  if (i < size) {
    char padded[kWord * bytes] = {};
    memcpy(padded, x + i * bytes, (size - i) * bytes);
    to = measure_word<T, M, kTwo>(padded, origin + i, (Word{1} << (size - i)) - 1, first, second, to);
  }
  first.add_to(search, 0);
  second.add_to(search, 1);
  search.found = to;
}

template <class T>
class Measurer {
 public:
  explicit Measurer(const Batch& batch) : batch_(batch), rounded_(kBF16 + 1), padded_(kTile * sizeof(T)) {}

  void measure_segment(const std::int64_t* row, const double* edges, std::int64_t* counts, T* found) {
    std::vector<Search<T>> searches;
    for (std::int64_t k = 0; k < batch_.n; ++k) searches.emplace_back(edges + k * kEdges, found + k * (row[0] + kSpare));
    for (std::int64_t start = 0; start < row[0]; start += kTile) {
      const int size = static_cast<int>(std::min<std::int64_t>(kTile, row[0] - start));
      load_base(row[1], start, size);
      for (std::int64_t k = 0; k < batch_.n; ++k) {
        const Dtype dtype = batch_.dtypes[k];
        const char* x = reinterpret_cast<const char*>(row[3 + k]) + start * kSizes[dtype];
        with_type<T>(dtype, [&](auto type) {
          using M = decltype(type);
          const T* from = origin(dtype);
          if (searches[k].is_double()) measure_tile<T, M, true>(x, from, size, searches[k]);
          else measure_tile<T, M, false>(x, from, size, searches[k]);
        });
      }
    }
    for (std::int64_t k = 0; k < batch_.n; ++k) searches[k].write(counts + k * kMagnitudesCounted);
  }

 private:
  void load_base(std::int64_t address, std::int64_t start, int size) {
    std::fill(is_rounded_, is_rounded_ + kBF16 + 1, false);
    // Of task vectors d_k is x_k: x_k - 0 has the same magnitude.
    if (batch_.task_vectors || !address) return base_.load(batch_.result, nullptr);
    const std::int64_t bytes = kSizes[batch_.result];
    const char* from = reinterpret_cast<const char*>(address) + start * bytes;
    if (size < kTile) {  // a copy with zeros behind it
      std::fill(padded_.begin(), padded_.end(), char{0});
      memcpy(padded_.data(), from, size * bytes);
      from = padded_.data();
    }
    base_.load(batch_.result, from);
  }

  // What differences of models of a type subtract.
  const T* origin(Dtype dtype) {
    if (batch_.task_vectors || holds(dtype, batch_.result)) return base_.values;
    if (!is_rounded_[dtype]) rounded_[dtype].round(dtype, base_);
    is_rounded_[dtype] = true;
    return rounded_[dtype].values;
  }

  const Batch& batch_;
  TileNumbers<T, kTile> base_;
  std::vector<TileNumbers<T, kTile>> rounded_;  // the base, by the type it is rounded to
  bool is_rounded_[kBF16 + 1];
  std::vector<char> padded_;
};

template <class T>
void measure(const Batch& batch, const MagnitudeIntervals& intervals) {
  std::vector<Measurer<T>> measurer;  // too large for the stack of a thread
  measurer.emplace_back(batch);
  T* found = static_cast<T*>(intervals.found);
  for (std::int64_t i = 0; i < batch.segments; ++i) {
    const std::int64_t first = i * batch.n;
    measurer[0].measure_segment(batch.row(i), intervals.edges + first * kEdges, intervals.counts + first * kMagnitudesCounted, found);
    found += batch.n * (batch.row(i)[0] + kSpare);
  }
}

}  // namespace

void NEGMERGE_MAGNITUDE_LOOP(const Batch& batch, const MagnitudeIntervals& intervals) {
  const PlainArithmetic plain;
  is_double(batch) ? measure<double>(batch, intervals) : measure<float>(batch, intervals);
}

}  // namespace negmerge
