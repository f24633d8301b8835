// Random batches by random choices, as main.cpp has them for the rule of NegMerge.
#include "../../../csrc/family.h"

#include <cstdio>

#include "../../../csrc/merge_cpu.h"
#include "memory.h"

namespace negmerge {
namespace {

// Merges element i of a segment, and adds to its counts. O: the output's type.
template <class T, class S, class O>
void merge_one(const Batch& batch, std::int64_t segment, std::int64_t i, const FamilyConstants<T>& constants) {
  const std::int64_t* of = batch.row(segment);
  const SegmentTerms terms = terms_of(batch, segment);
  typename S::Bits bits{};
  if (of[1]) bits = read<typename S::Bits>(reinterpret_cast<const char*>(of[1]) + i * sizeof bits);
  const T b = number<T, S>(reinterpret_cast<const char*>(&bits));
  const auto difference = [&](std::int64_t k) {
    const char* x = reinterpret_cast<const char*>(of[3 + k]) + i * kSizes[batch.dtypes[k]];
    return with_type(batch.dtypes[k], [&](auto m) {
      using M = decltype(m);
      const T minus = kHolds<M, S> ? b : static_cast<T>(as_stored<M, typename M::Word>(static_cast<typename M::Float>(b)));
      return batch.task_vectors ? number<T, M>(x) : number<T, M>(x) - minus;
    });
  };
  Reduced<T> reduced = reduce_one<T>(*batch.family, terms, i, constants, difference);
  T weight = T(1);
  if (terms.weights()) {
    const char* w = reinterpret_cast<const char*>(terms.weights()) + i * terms.weight_size();
    if (terms.weight_type() == kWeightU8) weight = static_cast<T>(static_cast<unsigned char>(*w));
    else if (terms.weight_type() == kWeightI32) weight = static_cast<T>(read<std::int32_t>(w));
    else if (terms.weight_type() == kWeightI64) weight = static_cast<T>(read<std::int64_t>(w));
    else weight = with_type(static_cast<Dtype>(terms.weight_type()), [&](auto m) { return static_cast<T>(number<double, decltype(m)>(w)); });
  }
  typename O::Bits kept{};
  if constexpr (std::is_same_v<O, S>)
    if (!batch.consensus) kept = bits;
  if (batch.consensus) reduced.finite &= b - b == T(0);
  const auto outcome = finish_family<O>(kept, reduced, weight, constants);
  if (of[2]) std::memcpy(reinterpret_cast<char*>(of[2]) + i * sizeof outcome.bits, &outcome.bits, sizeof outcome.bits);
  std::int64_t* counts = batch.counts + kFamilyCounted * segment;
  counts[0] += outcome.agreed;
  counts[1] += !outcome.finite;
  counts[2] += outcome.vetoed;
  counts[3] += outcome.masked;
}

template <class T, class S, class O>
void merge_plainly(const Batch& batch) {
  const auto constants = family_constants<T>(batch);
  for (std::int64_t s = 0; s < batch.segments; ++s)
    for (std::int64_t i = 0; i < batch.row(s)[0]; ++i) merge_one<T, S, O>(batch, s, i, constants);
}

void merge_plainly(const Batch& batch) {
  with_type(batch.result, [&](auto s) {
    using S = decltype(s);
    if (is_double(batch)) batch.consensus ? merge_plainly<double, S, F64>(batch) : merge_plainly<double, S, S>(batch);
    else batch.consensus ? merge_plainly<float, S, F32>(batch) : merge_plainly<float, S, S>(batch);
  });
}

double random_number() { return static_cast<double>(random_below(1000)) / 500; }

}  // namespace

bool same_family(int round) {
  const Dtype types[] = {kF64, kF32, kF16, kBF16};
  const std::int64_t n = 1 + random_below(round % 10 ? 9 : 30), segments = random_below(8);
  Family family{static_cast<Gate>(random_below(3)), static_cast<Election>(random_below(6)), static_cast<Reduction>(random_below(3)),
                random_bits(), random_number(), nullptr, nullptr};
  const bool ones = random_below(2), high = random_below(2);
  std::vector<double> numbers;
  for (std::int64_t i = 0; i < 2 * n; ++i) numbers.push_back(ones ? 1 : random_number() - 0.2);
  for (std::int64_t k = 0; k < n; ++k) numbers.push_back(static_cast<double>(random_below((std::int64_t{1} << 32) + 1)));
  family.numbers = numbers.data();
  Batch batch{};
  batch.family = &family;
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
  std::vector<std::int64_t> descriptors, terms;
  for (std::int64_t s = 0; s < segments; ++s) {
    const std::int64_t numel = random_below(4) ? random_below(200) : random_below(9'000);
    descriptors.push_back(numel);
    const auto add = [&](std::vector<Memory>& to, int dtype) {
      to.emplace_back(numel * kWeightSizes[dtype]);
      to.back().fill(dtype >= kWeightU8 ? kBF16 : static_cast<Dtype>(dtype));
      return reinterpret_cast<std::int64_t>(to.back().at);
    };
    const std::int64_t base = add(inputs, batch.result);
    descriptors.push_back(batch.task_vectors && !random_below(3) ? 0 : base);
    const std::int64_t written = add(out, batch.consensus ? is_double(batch) ? kF64 : kF32 : batch.result);
    descriptors.push_back(random_below(5) ? written : 0);
    for (const Dtype dtype : dtypes) descriptors.push_back(add(inputs, dtype));
    terms.push_back(random_below(std::int64_t{1} << 40));
    terms.push_back(random_below(std::int64_t{1} << 32));
    const std::int64_t type = random_below(7);
    terms.push_back(random_below(2) ? add(inputs, static_cast<int>(type)) : 0);
    terms.push_back(type);
    for (std::int64_t i = 0; i < 2 * n; ++i) {
      const double bound = i < n ? random_number() / 2 : high ? 1 + random_number() : __builtin_huge_val();
      std::int64_t packed;
      std::memcpy(&packed, &bound, sizeof packed);
      terms.push_back(packed);
    }
  }
  batch.descriptors = descriptors.data();
  family.terms = terms.data();

  const auto results_of = [&](const auto& merge) {
    std::vector<std::int64_t> counts(kFamilyCounted * segments);
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
        std::printf("round %d: choices %d %d %d: %s on %d threads differs from the rule\n", round, family.gate, family.election,
                    family.reduction, instruction_set.c_str(), threads);
        return false;
      }
  return true;
}

}  // namespace negmerge
