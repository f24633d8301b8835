// Random batches with every instruction set and several numbers of threads, for the sanitizers. Each operand has memory of its
// own, of exactly its size, at any alignment. All must give the bits and counts of the rule for one element.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>

#include "../../../csrc/dtypes.h"
#include "../../../csrc/merge_cpu.h"
#include "../../../csrc/merge_rule.h"

using namespace negmerge;

namespace {

std::mt19937_64 random_bits(1);

std::int64_t random_below(std::int64_t bound) {
  return static_cast<std::int64_t>(random_bits() % static_cast<std::uint64_t>(bound));
}

// Bytes at any address; those behind them belong to nobody.
struct Memory {
  std::unique_ptr<char[]> held;
  char* at;
  std::int64_t size;

  explicit Memory(std::int64_t bytes) : size(bytes) {
    const std::int64_t offset = random_below(64);
    held.reset(new char[offset + bytes]);
    at = held.get() + offset;
  }
  void fill(Dtype dtype) {
    for (std::int64_t i = 0; i < size; i += 8) {
      const std::uint64_t bits = random_bits();
      std::memcpy(at + i, &bits, std::min<std::int64_t>(8, size - i));
    }
    // Most numbers of ordinary size.
    if (dtype == kF32 || dtype == kF64)
      for (std::int64_t i = kSizes[dtype] - 1; i < size; i += kSizes[dtype])
        if (i % 7) at[i] = static_cast<char>((at[i] & 0x80) | 0x3f);
  }
};

template <class Bits>
Bits read(const char* from) {
  Bits bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}

// A stored number in arithmetic type T.
template <class T, class M>
T number(const char* from) {
  return static_cast<T>(M::template widen<typename M::Float>(typename M::Word{read<typename M::Bits>(from)}));
}

// d_k of a model of type M.
template <class T, class S, class M>
T difference(T b, const char* x, bool task_vectors) {
  if (task_vectors) return number<T, M>(x);
  if (!kHolds<M, S>) b = static_cast<T>(as_stored<M, typename M::Word>(static_cast<typename M::Float>(b)));
  return number<T, M>(x) - b;
}

// Merges element i of a segment, and adds to its counts. of: its descriptors.
template <class T, class S, template <class, class> class Accumulator>
void merge_one(const Batch& batch, const std::int64_t* of, std::int64_t i, std::int64_t* counts) {
  const Constants<T> constants{static_cast<T>(batch.scale), static_cast<T>(batch.n), static_cast<T>(batch.required),
                               static_cast<T>(batch.n - batch.required)};
  const char* base = reinterpret_cast<const char*>(of[1]) + i * sizeof(typename S::Bits);
  Accumulator<T, T> accumulator;
  for (std::int64_t k = 0; k < batch.n; ++k) {
    const char* x = reinterpret_cast<const char*>(of[3 + k]) + i * kSizes[batch.dtypes[k]];
    const T b = number<T, S>(base);
    accumulator.accumulate(batch.dtypes[k] == kF64   ? difference<T, S, F64>(b, x, batch.task_vectors)
                           : batch.dtypes[k] == kF32 ? difference<T, S, F32>(b, x, batch.task_vectors)
                           : batch.dtypes[k] == kF16 ? difference<T, S, F16>(b, x, batch.task_vectors)
                                                     : difference<T, S, BF16>(b, x, batch.task_vectors));
  }
  const auto outcome = finish<S>(read<typename S::Bits>(base), accumulator, constants);
  std::memcpy(reinterpret_cast<char*>(of[2]) + i * sizeof outcome.bits, &outcome.bits, sizeof outcome.bits);
  counts[0] += outcome.agreed;
  counts[1] += !outcome.finite;
  counts[2] += outcome.vetoed;
}

template <class T, class S>
void merge_plainly(const Batch& batch) {
  for (std::int64_t s = 0; s < batch.segments; ++s)
    for (std::int64_t i = 0; i < batch.row(s)[0]; ++i)
      if (batch.required == batch.n) merge_one<T, S, Unanimous>(batch, batch.row(s), i, batch.counts + kCounted * s);
      else merge_one<T, S, Majority>(batch, batch.row(s), i, batch.counts + kCounted * s);
}

template <class S>
void merge_plainly(const Batch& batch) {
  is_double(batch) ? merge_plainly<double, S>(batch) : merge_plainly<float, S>(batch);
}

bool same_results(int round) {
  const Dtype types[] = {kF64, kF32, kF16, kBF16};
  const std::int64_t n = 1 + random_below(round % 10 ? 9 : 40), segments = random_below(30);
  Batch batch{};
  batch.result = types[random_below(4)];
  std::vector<Dtype> dtypes;
  for (std::int64_t k = 0; k < n; ++k) dtypes.push_back(round % 2 ? batch.result : types[random_below(4)]);
  batch.dtypes = dtypes.data();
  batch.n = n;
  batch.task_vectors = random_below(2);
  batch.scale = 0.9;
  batch.required = random_below(2) ? n : n / 2 + 1;
  batch.segments = segments;

  std::vector<Memory> inputs, out;
  std::vector<std::int64_t> descriptors;
  for (std::int64_t s = 0; s < segments; ++s) {
    const std::int64_t numel = random_below(4) ? random_below(200) : random_below(20'000);
    descriptors.push_back(numel);
    const auto add = [&](std::vector<Memory>& to, Dtype dtype) {
      to.emplace_back(numel * kSizes[dtype]);
      to.back().fill(dtype);
      descriptors.push_back(reinterpret_cast<std::int64_t>(to.back().at));
    };
    add(inputs, batch.result);
    add(out, batch.result);
    const char* base = inputs.back().at;
    for (const Dtype dtype : dtypes) {
      add(inputs, dtype);
      // Some elements are left as they were.
      for (std::int64_t i = random_below(3); dtype == batch.result && i < numel; i += 1 + random_below(5))
        std::memcpy(inputs.back().at + i * kSizes[dtype], base + i * kSizes[dtype], kSizes[dtype]);
    }
  }
  batch.descriptors = descriptors.data();

  const auto results_of = [&](const auto& merge) {
    std::vector<std::int64_t> counts(kCounted * segments);
    batch.counts = counts.data();
    for (Memory& memory : out) std::memset(memory.at, 0xa5, memory.size);
    merge();
    std::vector<char> written;
    for (const Memory& memory : out) written.insert(written.end(), memory.at, memory.at + memory.size);
    return std::pair(counts, written);
  };
  const auto expected = results_of([&] {
    batch.result == kF64   ? merge_plainly<double, F64>(batch)
    : batch.result == kF32 ? merge_plainly<F32>(batch)
    : batch.result == kF16 ? merge_plainly<F16>(batch)
                           : merge_plainly<BF16>(batch);
  });
  for (const std::string& instruction_set : instruction_sets())
    for (const int threads : {1, 4})
      if (results_of([&] { merge_cpu(batch, threads, instruction_set); }) != expected) {
        std::printf("round %d: %s on %d threads differs from the rule\n", round, instruction_set.c_str(), threads);
        return false;
      }
  return true;
}

constexpr int kRounds = 80;

}  // namespace

int main() {
  for (int round = 0; round < kRounds; ++round)
    if (!same_results(round)) return 1;
  std::printf("%d batches: the same bits\n", kRounds);
}
