// Counts of prefixes over consecutive elements, on one thread. Compiled once for each instruction set (CMakeLists.txt).
//
// Each model's differences of a tile become bits, one for an element; all else is done on words of these bits.
#include <algorithm>
#include <cstring>
#include <vector>

#include "arithmetic.h"
#include "prefix.h"
#include "tile_numbers.h"

namespace negmerge {
namespace {

// Elements of a tile: their sums stay in the first-level cache, and each model's are long enough to be read fast.
constexpr int kTile = 1024, kWords = kTile / 64;

// A bit for each element of a tile.
struct Flags {
  Word words[kWords];
};

// The elements of a tile in the arithmetic type.
template <class T>
struct Numbers : TileNumbers<T, kTile> {
  using TileNumbers<T, kTile>::values;

  Flags finite() const {
    Flags found = {};
    for (int i = 0; i < kTile; ++i) found.words[i / 64] |= static_cast<Word>(values[i] - values[i] == T(0)) << i % 64;
    return found;
  }
};

// The differences of a model: finite and above zero, finite and below, finite.
struct Signs {
  Flags positive, negative, finite;

  Word zero(int w) const { return finite.words[w] & ~(positive.words[w] | negative.words[w]); }
  Word sign(int w) const { return positive.words[w] | negative.words[w]; }
};

// Adds a model's differences to the sums, and returns their signs and whether the sums are finite then.
template <class T, class M>
void subtract(const char* x, const Numbers<T>& origin, Numbers<T>& sums, Signs& signs, Flags& finite_sums) {
  using N = typename Lanes<T>::N;
  constexpr int lanes = Lanes<T>::lanes;
  const N zero = {}, infinity = zero + T(__builtin_huge_val());
  for (int w = 0; w < kWords; ++w) {
    Word positive = 0, negative = 0, finite = 0, finite_sum = 0;
    for (int lane = 0; lane < 64; lane += lanes) {
      const int i = 64 * w + lane;
      N b, sum;
      memcpy(&b, origin.values + i, sizeof b);
      memcpy(&sum, sums.values + i, sizeof sum);
      const N d = load<T, M>(x + i * sizeof(typename M::Bits)) - b;
      sum = sum + d;
      memcpy(sums.values + i, &sum, sizeof sum);
      positive |= bits_of(d > zero) << lane;
      negative |= bits_of(d < zero) << lane;
      finite |= bits_of(magnitude(d) < infinity) << lane;
      finite_sum |= bits_of(magnitude(sum) < infinity) << lane;
    }
    signs.positive.words[w] = positive & finite;
    signs.negative.words[w] = negative & finite;
    signs.finite.words[w] = finite;
    finite_sums.words[w] = finite_sum;
  }
}

std::int64_t count(const Flags& flags) {
  std::int64_t found = 0;
  for (const Word word : flags.words) found += __builtin_popcountll(word);
  return found;
}

// What is known of the elements of a tile after some models.
struct Known {
  Flags valid, base_finite;                    // elements of the segment; and of these, where the base is finite
  Flags not_positive, not_negative;            // where some model is not
  Flags twice_not_positive, twice_not_negative;
  Flags positive, negative, finite;            // where some model is; where all are
  Flags agreed;

  void start(int size, const Flags& base) {
    *this = {};
    for (int w = 0; w < kWords; ++w) {
      const int more = std::clamp(size - 64 * w, 0, 64);
      valid.words[w] = more == 64 ? ~Word{0} : (Word{1} << more) - 1;
      base_finite.words[w] = finite.words[w] = agreed.words[w] = base.words[w] & valid.words[w];
    }
  }

  Word one_sign(int w) const { return ~(not_positive.words[w] & not_negative.words[w]); }

  void add(const Signs& signs, const Flags& finite_sums, Flags (&counted)[kOfPrefix]) {
    for (int w = 0; w < kWords; ++w) {
      const Word p = signs.positive.words[w], n = signs.negative.words[w];
      twice_not_positive.words[w] |= not_positive.words[w] & ~p;
      twice_not_negative.words[w] |= not_negative.words[w] & ~n;
      not_positive.words[w] |= ~p;
      not_negative.words[w] |= ~n;
      positive.words[w] |= p;
      negative.words[w] |= n;
      finite.words[w] &= signs.finite.words[w];
      const Word one = one_sign(w), nonfinite = valid.words[w] & (~finite.words[w] | (one & ~finite_sums.words[w]));
      counted[3].words[w] = agreed.words[w] & signs.zero(w);
      counted[4].words[w] = agreed.words[w] & ~one & signs.sign(w);
      counted[0].words[w] = agreed.words[w] = valid.words[w] & one & ~nonfinite;
      counted[1].words[w] = nonfinite;
      counted[2].words[w] = valid.words[w] & ~(nonfinite | one | (positive.words[w] & negative.words[w]));
    }
  }
};

// Counts the models of one sign for each element, in binary: a digit of all elements after another.
class Votes {
 public:
  explicit Votes(std::int64_t n) : n_(n) {
    while (n >> digits_.size()) digits_.emplace_back();
  }

  void start() { std::fill(digits_.begin(), digits_.end(), Flags{}); }

  void add(const Flags& votes) {
    Flags carry = votes;
    for (Flags& digit : digits_)
      for (int w = 0; w < kWords; ++w) {
        const Word both = digit.words[w] & carry.words[w];
        digit.words[w] ^= carry.words[w];
        carry.words[w] = both;
      }
  }

  // Where more than half of the models have the sign.
  Flags majority() const {
    Flags more = {}, same;
    std::fill(same.words, same.words + kWords, ~Word{0});
    for (std::size_t digit = digits_.size(); digit--;)
      for (int w = 0; w < kWords; ++w) {
        const Word found = digits_[digit].words[w], half = n_ / 2 >> digit & 1 ? ~Word{0} : 0;
        more.words[w] |= same.words[w] & found & ~half;
        same.words[w] &= ~(found ^ half);
      }
    return more;
  }

 private:
  std::int64_t n_;
  std::vector<Flags> digits_;
};

// Counts magnitudes into bins.
class Histogram {
 public:
  Histogram(const Bins& bins, std::int64_t* counts) : bins_(bins), counts_(counts) {
    // A straight line between powers of two is within 0.09 of the logarithm: the bin is the one it says, or one beside it.
    first_ = line(bins.edges[0]);
    per_bin_ = static_cast<double>(bins.count - 1) / (line(bins.edges[bins.count - 1]) - first_);
  }

  void add(double magnitude) {
    std::int64_t bin = std::clamp(static_cast<std::int64_t>((line(magnitude) - first_) * per_bin_) + 1, std::int64_t{0}, bins_.count);
    while (bin < bins_.count && magnitude >= bins_.edges[bin]) ++bin;
    while (bin > 0 && magnitude < bins_.edges[bin - 1]) --bin;
    ++counts_[bin];
  }

 private:
  static double line(double magnitude) { return static_cast<double>(bits_as<std::uint64_t>(magnitude)) * 0x1p-52; }

  const Bins& bins_;
  std::int64_t* counts_;
  double first_, per_bin_;
};

template <class T>
class Counter {
 public:
  Counter(const Batch& batch, const Bins& bins)
      : batch_(batch), bins_(bins), signs_(batch.n), positive_(batch.n), negative_(batch.n), rounded_(kBF16 + 1), padded_(kTile * sizeof(T)) {}

  void count_segment(const std::int64_t* row, std::int64_t* counts) {
    Histogram histogram(bins_, counts + kPrefixCounted * batch_.n);
    for (std::int64_t start = 0; start < row[0]; start += kTile) {
      start_ = start;
      size_ = static_cast<int>(std::min<std::int64_t>(kTile, row[0] - start));
      count_prefixes(row, counts);
      count_models(counts + kOfPrefix * batch_.n);
      for (int w = 0; w < kWords; ++w)
        for (Word left = known_.agreed.words[w]; left; left &= left - 1) {
          const T mean = sums_.values[64 * w + __builtin_ctzll(left)] / static_cast<T>(batch_.n);
          histogram.add(static_cast<double>(magnitude(mean)));
        }
    }
  }

 private:
  // A whole tile of an operand: at the end of a segment, a copy with zeros behind it.
  const char* at(std::int64_t address, Dtype dtype) {
    const std::int64_t size = kSizes[dtype];
    const char* from = reinterpret_cast<const char*>(address);
    if (!from || size_ == kTile) return from ? from + start_ * size : from;
    std::fill(padded_.begin(), padded_.end(), char{0});
    memcpy(padded_.data(), from + start_ * size, size_ * size);
    return padded_.data();
  }

  void count_prefixes(const std::int64_t* row, std::int64_t* counts) {
    base_.load(batch_.result, at(row[1], batch_.result));
    known_.start(size_, base_.finite());
    positive_.start();
    negative_.start();
    sums_ = {};
    bool is_rounded[kBF16 + 1] = {};
    for (std::int64_t k = 0; k < batch_.n; ++k) {
      const Dtype dtype = batch_.dtypes[k];
      const Numbers<T>* origin = batch_.task_vectors ? &zeros_ : &base_;
      if (!batch_.task_vectors && !holds(dtype, batch_.result)) {
        if (!is_rounded[dtype]) rounded_[dtype].round(dtype, base_);
        is_rounded[dtype] = true;
        origin = &rounded_[dtype];
      }
      Flags finite_sums, counted[kOfPrefix];
      const char* x = at(row[3 + k], dtype);
      with_type<T>(dtype, [&](auto type) { subtract<T, decltype(type)>(x, *origin, sums_, signs_[k], finite_sums); });
      known_.add(signs_[k], finite_sums, counted);
      for (int kind = 0; kind < kOfPrefix; ++kind) counts[kind * batch_.n + k] += count(counted[kind]);
      positive_.add(signs_[k].positive);
      negative_.add(signs_[k].negative);
    }
  }

  void count_models(std::int64_t* counts) {
    const Flags positive = positive_.majority(), negative = negative_.majority();
    for (std::int64_t k = 0; k < batch_.n; ++k) {
      Flags counted[kOfModel];
      const Signs& signs = signs_[k];
      for (int w = 0; w < kWords; ++w) {
        const Word not_positive = ~signs.positive.words[w], not_negative = ~signs.negative.words[w];
        // Where all models but this one have one sign.
        const Word sole = known_.base_finite.words[w] & ~known_.one_sign(w) &
                           ((known_.not_positive.words[w] & ~known_.twice_not_positive.words[w] & not_positive) |
                            (known_.not_negative.words[w] & ~known_.twice_not_negative.words[w] & not_negative));
        counted[0].words[w] = sole & signs.zero(w);
        counted[1].words[w] = sole & signs.sign(w);
        counted[2].words[w] = sole & ~signs.finite.words[w];
        counted[3].words[w] = known_.base_finite.words[w] & ((positive.words[w] & not_positive) | (negative.words[w] & not_negative));
      }
      for (int kind = 0; kind < kOfModel; ++kind) counts[kind * batch_.n + k] += count(counted[kind]);
    }
  }

  const Batch& batch_;
  const Bins& bins_;
  std::vector<Signs> signs_;
  Votes positive_, negative_;
  // Of task vectors d_k is x_k: x_k - 0 has the same sign, and its sum the same magnitude.
  Numbers<T> base_, sums_, zeros_ = {};
  std::vector<Numbers<T>> rounded_;  // the base, by the type it is rounded to
  std::vector<char> padded_;
  Known known_;
  std::int64_t start_ = 0;
  int size_ = 0;
};

template <class T>
void count_batch(const Batch& batch, const Bins& bins) {
  std::vector<Counter<T>> counter;  // too large for the stack of a thread
  counter.emplace_back(batch, bins);
  for (std::int64_t i = 0; i < batch.segments; ++i) counter[0].count_segment(batch.row(i), batch.counts + i * bins.columns(batch.n));
}

}  // namespace

void NEGMERGE_PREFIX_LOOP(const Batch& batch, const Bins& bins) {
  const PlainArithmetic plain;
  is_double(batch) ? count_batch<double>(batch, bins) : count_batch<float>(batch, bins);
}

}  // namespace negmerge
