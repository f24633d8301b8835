// Random batches with every instruction set and several numbers of threads, for the sanitizers. Each operand has memory of its
// own, of exactly its size, at any alignment. All must give the bits and counts of the rule for one element.
#include <cstdio>

#include "../../../csrc/merge_cpu.h"
#include "../../../csrc/magnitudes.h"
#include "../../../csrc/prefix.h"
#include "memory.h"

using namespace negmerge;

namespace {

// d_k of a model of type M.
template <class T, class S, class M>
T difference(T b, const char* x, bool task_vectors) {
  if (task_vectors) return number<T, M>(x);
  if (!kHolds<M, S>) b = static_cast<T>(as_stored<M, typename M::Word>(static_cast<typename M::Float>(b)));
  return number<T, M>(x) - b;
}

// Merges element i of a segment, and adds to its counts. of: its descriptors; O: the output's type.
template <class T, class S, class O, template <class, class> class Accumulator>
void merge_one(const Batch& batch, const std::int64_t* of, std::int64_t i, std::int64_t* counts) {
  const Constants<T> constants{static_cast<T>(batch.scale), static_cast<T>(batch.n), static_cast<T>(batch.required),
                               static_cast<T>(batch.n - batch.required)};
  typename S::Bits bits{};
  if (of[1]) bits = read<typename S::Bits>(reinterpret_cast<const char*>(of[1]) + i * sizeof bits);
  const T b = number<T, S>(reinterpret_cast<const char*>(&bits));
  Accumulator<T, T> accumulator;
  for (std::int64_t k = 0; k < batch.n; ++k) {
    const char* x = reinterpret_cast<const char*>(of[3 + k]) + i * kSizes[batch.dtypes[k]];
    const T d = with_type(batch.dtypes[k], [&](auto m) { return difference<T, S, decltype(m)>(b, x, batch.task_vectors); });
    // A mean has nothing of the base, which must be finite.
    accumulator.accumulate(batch.consensus ? d - (b - b) : d);
  }
  typename O::Bits kept{};
  if constexpr (std::is_same_v<O, S>)
    if (!batch.consensus) kept = bits;
  const auto outcome = finish<O>(kept, accumulator, constants);
  if (of[2]) std::memcpy(reinterpret_cast<char*>(of[2]) + i * sizeof outcome.bits, &outcome.bits, sizeof outcome.bits);
  counts[0] += outcome.agreed;
  counts[1] += !outcome.finite;
  counts[2] += outcome.vetoed;
}

template <class T, class S, class O>
void merge_plainly(const Batch& batch) {
  for (std::int64_t s = 0; s < batch.segments; ++s)
    for (std::int64_t i = 0; i < batch.row(s)[0]; ++i)
      if (batch.required == batch.n) merge_one<T, S, O, Unanimous>(batch, batch.row(s), i, batch.counts + kCounted * s);
      else merge_one<T, S, O, Majority>(batch, batch.row(s), i, batch.counts + kCounted * s);
}

void merge_plainly(const Batch& batch) {
  with_type(batch.result, [&](auto s) {
    using S = decltype(s);
    if (is_double(batch)) batch.consensus ? merge_plainly<double, S, F64>(batch) : merge_plainly<double, S, S>(batch);
    else batch.consensus ? merge_plainly<float, S, F32>(batch) : merge_plainly<float, S, S>(batch);
  });
}

// Prefixes of all lengths, the longest of which counts as a consensus does.
bool same_prefixes(Batch batch) {
  std::vector<std::int64_t> rows(batch.descriptors, batch.row(batch.segments)), counts(kCounted * batch.segments), first;
  for (std::int64_t s = 0; s < batch.segments; ++s) rows[s * (3 + batch.n) + 2] = 0;  // nothing is written
  batch.descriptors = rows.data();
  batch.counts = counts.data();
  batch.consensus = true;
  batch.scale = -1;
  batch.required = batch.n;
  merge_plainly(batch);
  const double edges[] = {1e-8, 1e-4, 1e-2, 1, 100};
  const Bins bins{edges, 5};
  const std::int64_t columns = bins.columns(batch.n);
  for (const std::string& instruction_set : instruction_sets()) {
    std::vector<std::int64_t> found(columns * batch.segments);
    batch.counts = found.data();
    count_prefixes(batch, bins, instruction_set);
    for (std::int64_t s = 0; s < batch.segments; ++s)
      for (int kind = 0; kind < kCounted; ++kind)
        if (found[s * columns + (kind + 1) * batch.n - 1] != counts[kCounted * s + kind]) return false;
    if (first.empty()) first = found;
    if (found != first) return false;
  }
  return true;
}

// Magnitudes below the edges of random intervals, and those in them, of all models.
template <class T>
bool same_magnitudes(const Batch& batch, const std::string& instruction_set) {
  const T choices[] = {0, T(1e-40), T(0.125), T(0.5), std::nextafter(T(0.5), T(1)), 1, 1.5, 2, 100, T(INFINITY)};
  std::vector<double> edges;
  std::int64_t elements = 0;
  for (std::int64_t s = 0; s < batch.segments; ++s) {
    elements += batch.row(s)[0] + kSpare;
    for (std::int64_t k = 0; k < batch.n; ++k) {
      std::vector<T> own;
      for (int i = 0; i < kEdges; ++i) own.push_back(choices[random_below(10)]);
      std::sort(own.begin(), own.end());
      if (random_below(2)) own[2] = own[3] = 0;
      edges.insert(edges.end(), own.begin(), own.end());
    }
  }
  std::vector<T> found(elements * batch.n);
  std::vector<std::int64_t> counts(batch.segments * batch.n * kMagnitudesCounted, -1);
  measure_magnitudes(batch, {edges.data(), counts.data(), found.data()}, instruction_set);
  const char* to = reinterpret_cast<const char*>(found.data());
  for (std::int64_t s = 0; s < batch.segments; ++s)
    for (std::int64_t k = 0; k < batch.n; ++k) {
      const std::int64_t* row = batch.row(s);
      const double* edge = &edges[(s * batch.n + k) * kEdges];
      std::int64_t expected[kMagnitudesCounted] = {};
      const char* at = to;
      for (std::int64_t i = 0; i < row[0]; ++i) {
        const T d = with_type(batch.result, [&](auto type) {
          using S = decltype(type);
          typename S::Bits bits{};
          if (row[1]) bits = read<typename S::Bits>(reinterpret_cast<const char*>(row[1]) + i * sizeof bits);
          const T b = number<T, S>(reinterpret_cast<const char*>(&bits));
          const char* x = reinterpret_cast<const char*>(row[3 + k]) + i * kSizes[batch.dtypes[k]];
          return with_type(batch.dtypes[k], [&](auto m) { return difference<T, S, decltype(m)>(b, x, batch.task_vectors); });
        });
        bool inside = false;
        for (int w = 0; w < (edge[3] > 0 ? kEdges : 2); w += 2) {
          const T low = edge[w], high = edge[w + 1];
          for (int end = 0; end < 2; ++end) expected[w + end] += std::fabs(d) < (end ? high : low);
          inside |= std::fabs(d) >= low && std::fabs(d) < high && std::nextafter(low, high) < high;
        }
        if (!inside) continue;
        ++expected[kEdges];
        if (read<T>(at) != std::fabs(d)) return false;
        at += sizeof(T);
      }
      if (std::memcmp(expected, &counts[(s * batch.n + k) * kMagnitudesCounted], sizeof expected)) return false;
      to += (row[0] + kSpare) * sizeof(T);
    }
  return true;
}

bool same_magnitudes(const Batch& batch) {
  for (const std::string& each : instruction_sets())
    if (!(is_double(batch) ? same_magnitudes<double>(batch, each) : same_magnitudes<float>(batch, each))) return false;
  return true;
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
  batch.consensus = random_below(2);
  batch.scale = batch.consensus ? -1 : 0.9;
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
    const char* base = inputs.back().at;
    if (batch.task_vectors && !random_below(3)) descriptors.back() = 0;
    add(out, batch.consensus ? is_double(batch) ? kF64 : kF32 : batch.result);
    if (!random_below(5)) descriptors.back() = 0;
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
  const auto expected = results_of([&] { merge_plainly(batch); });
  for (const std::string& instruction_set : instruction_sets())
    for (const int threads : {1, 4})
      if (results_of([&] { merge_cpu(batch, threads, instruction_set); }) != expected) {
        std::printf("round %d: %s on %d threads differs from the rule\n", round, instruction_set.c_str(), threads);
        return false;
      }
  if (!same_prefixes(batch)) {
    std::printf("round %d: counts of prefixes differ\n", round);
    return false;
  }
  if (same_magnitudes(batch)) return true;
  std::printf("round %d: magnitudes differ\n", round);
  return false;
}

constexpr int kRounds = 80;

}  // namespace

int main() {
  for (int round = 0; round < kRounds; ++round)
    if (!same_results(round) || !same_family(round) || !same_deltas(round) || !same_masks(round) || !same_low_rank(round)) return 1;
  std::printf("%d rounds: the same bits\n", kRounds);
}
