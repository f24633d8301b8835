// Consensus deltas, as main.cpp does merges. Masks have bits behind the last element.
#include "../../../csrc/delta.h"

#include <cstdio>
#include <string>

#include "../../../csrc/merge_cpu.h"
#include "memory.h"

namespace negmerge {
namespace {

bool failed(const char* what, int round, const std::string& instruction_set) {
  std::printf("%s, round %d: %s differs from the rule\n", what, round, instruction_set.c_str());
  return false;
}

std::int64_t random_length() {
  const std::int64_t around[] = {0, 64, 1024, 2048, 4096, 9216};
  return random_below(2) ? random_below(30'000) : std::max<std::int64_t>(0, around[random_below(6)] + random_below(3) - 1);
}

struct Mask : Memory {
  explicit Mask(std::int64_t numel) : Memory((numel + kMaskWord - 1) / kMaskWord * 8) {
    fill(kF16);
    if (random_below(3) == 0) std::memset(at, random_below(2) ? 0xff : 0, size / 16 * 8);
  }
  bool operator[](std::int64_t i) const { return at[i / 8] >> i % 8 & 1; }
  std::int64_t rank(std::int64_t begin, std::int64_t end) const {
    std::int64_t count = 0;
    for (; begin < end; ++begin) count += (*this)[begin];
    return count;
  }
};

std::vector<std::int64_t> plain_ranks(const Mask& mask, std::int64_t numel) {
  std::vector<std::int64_t> ranks;
  for (std::int64_t i = 0; i < numel; i += kRankBlock) ranks.push_back(mask.rank(0, i));
  return ranks;
}

struct Tensor {
  std::int64_t numel;
  Mask mask;
  Memory base, out, means, saved;
  std::vector<std::int64_t> ranks;
  std::vector<char> packed;  // the base's elements that are in the mask

  Tensor(std::int64_t numel, const DeltaBatch& batch)
      : numel(numel), mask(numel), base(numel * kSizes[batch.result]), out(base.size),
        means(mask.rank(0, numel) * kSizes[batch.means]), saved(mask.rank(0, numel) * kSizes[batch.result]),
        ranks(plain_ranks(mask, numel)) {
    base.fill(batch.result);
    means.fill(batch.means);
    for (std::int64_t i = 0, size = kSizes[batch.result]; i < numel; ++i)
      if (mask[i]) packed.insert(packed.end(), base.at + i * size, base.at + (i + 1) * size);
  }
};

// Writes the results of packed elements, and counts.
template <class T, class S, class M>
void negate_plainly(const DeltaBatch& batch, const Tensor& tensor, char* results, std::int64_t* counts) {
  const Constants<T> constants{static_cast<T>(batch.scale), 0, 0, 0};
  for (std::int64_t i = 0; i * kSizes[batch.means] < tensor.means.size; ++i) {
    const char* before = tensor.packed.data() + i * sizeof(typename S::Bits);
    const T mean = number<T, M>(tensor.means.at + i * sizeof(typename M::Bits));
    const auto result = static_cast<typename S::Float>(negated_mean(number<T, S>(before), mean, constants));
    const bool finite = in_range<S>(result);
    auto bits = read<typename S::Bits>(before);
    if (finite) bits = static_cast<typename S::Bits>(S::template round<typename S::Word>(result));
    counts[0] += bits != read<typename S::Bits>(before);
    counts[1] += !finite;
    std::memcpy(results + i * sizeof bits, &bits, sizeof bits);
  }
}

// How a delta is applied: from where, and to where.
struct Case {
  Act act;
  bool from_saved;
  enum { kNowhere, kApart, kInPlace } to;
};

bool same_case(DeltaBatch batch, std::vector<Tensor>& tensors, const Case& one, int threads, const std::string& instruction_set) {
  std::vector<std::int64_t> rows, counts(kApplied * tensors.size()), expected_counts = counts;
  for (Tensor& tensor : tensors) {
    if (one.to == Case::kInPlace) std::copy_n(tensor.base.at, tensor.base.size, tensor.out.at);
    else std::fill_n(tensor.out.at, tensor.out.size, char(0xa5));
    if (one.act == Act::kSave) std::fill_n(tensor.saved.at, tensor.saved.size, char(0xa5));
    const std::int64_t base = one.from_saved ? 0 : one.to == Case::kInPlace ? tensor.out.address() : tensor.base.address();
    const std::int64_t saved = one.from_saved || one.act == Act::kSave ? tensor.saved.address() : 0;
    rows.insert(rows.end(), {tensor.numel, tensor.mask.address(), tensor.means.address(),
                             reinterpret_cast<std::int64_t>(tensor.ranks.data()), base, saved,
                             one.to == Case::kNowhere ? 0 : tensor.out.address()});
  }
  batch.act = one.act;
  batch.descriptors = rows.data();
  batch.counts = counts.data();
  apply_cpu(batch, threads, instruction_set);

  const std::int64_t size = kSizes[batch.result];
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    const Tensor& tensor = tensors[t];
    std::vector<char> results = tensor.packed, out(tensor.out.size, char(0xa5));
    if (one.act == Act::kApply)
      with_type(batch.result, [&](auto s) {
        with_type(batch.means, [&](auto m) {
          using S = decltype(s);
          using M = decltype(m);
          std::int64_t* to = expected_counts.data() + kApplied * t;
          batch.is_double ? negate_plainly<double, S, M>(batch, tensor, results.data(), to)
                          : negate_plainly<float, S, M>(batch, tensor, results.data(), to);
        });
      });
    if (one.to != Case::kNowhere) {
      if (!one.from_saved) out.assign(tensor.base.at, tensor.base.at + tensor.base.size);
      for (std::int64_t i = 0, found = 0; i < tensor.numel; ++i)
        if (tensor.mask[i]) std::copy_n(results.data() + size * found++, size, out.data() + size * i);
    }
    if (!std::equal(out.begin(), out.end(), tensor.out.at)) return false;
    if (!std::equal(tensor.packed.begin(), tensor.packed.end(), tensor.saved.at)) return false;
  }
  return counts == expected_counts;
}

// Packs numbers of type A as M; returns how many are set.
template <class A, class M>
std::int64_t pack_plainly(const Memory& dense, std::int64_t numel, std::vector<char>& mask, std::vector<char>& means) {
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < numel; ++i) {
    const auto x = static_cast<typename M::Float>(number<typename A::Float, A>(dense.at + i * sizeof(typename A::Bits)));
    const auto bits = static_cast<typename M::Bits>(M::template round<typename M::Word>(x));
    if (!in_range<M>(x) || !static_cast<typename M::Bits>(bits << 1)) continue;
    mask[i / 8] = static_cast<char>(mask[i / 8] | 1 << i % 8);
    std::memcpy(means.data() + count++ * sizeof bits, &bits, sizeof bits);
  }
  return count;
}

template <class A, class M>
bool same_masks_of(Dtype arithmetic, Dtype stored, std::int64_t numel, const DeltaLoop& loop) {
  Memory dense(numel * kSizes[arithmetic]), means(numel * kSizes[stored]);
  Mask mask(numel);
  dense.fill(arithmetic);
  for (std::int64_t i = random_below(3); i < numel; i += 1 + random_below(5))
    std::memset(dense.at + i * kSizes[arithmetic], 0, kSizes[arithmetic]);
  std::vector<char> packed_mask(mask.size), packed(means.size);
  const std::int64_t count = pack_plainly<A, M>(dense, numel, packed_mask, packed);
  for (char* to : {means.at, dense.at}) {  // the second time in place
    if (loop.pack(dense.at, numel, arithmetic, stored, mask.at, to) != count ||
        !std::equal(packed_mask.begin(), packed_mask.end(), mask.at) ||
        !std::equal(packed.data(), packed.data() + count * kSizes[stored], to))
      return false;
  }

  const Mask any(numel);
  std::vector<std::int64_t> ranks(plain_ranks(any, numel).size());
  if (rank_blocks(loop, any.at, numel, ranks.data()) != any.rank(0, numel) || ranks != plain_ranks(any, numel)) return false;
  const std::int64_t begin = random_below(2) ? 0 : random_below(numel + 1);
  const std::int64_t end = random_below(2) ? numel : begin + random_below(numel - begin + 1);
  Memory exact(any.rank(begin, end) * kSizes[stored]), expanded((end - begin) * kSizes[arithmetic]);
  exact.fill(stored);
  loop.expand(any.at, begin, end - begin, exact.at, stored, arithmetic, expanded.at);
  const char* from = exact.at;
  for (std::int64_t i = begin; i < end; ++i) {
    typename A::Float mean = 0;
    if (any[i]) mean = number<typename A::Float, M>(from), from += kSizes[stored];
    if (std::memcmp(&mean, expanded.at + (i - begin) * kSizes[arithmetic], sizeof mean)) return false;
  }
  return loop.rank(any.at, begin, end) == any.rank(begin, end);
}

}  // namespace

bool same_deltas(int round) {
  const Dtype types[] = {kF32, kF16, kBF16, kF64};
  DeltaBatch batch{};
  batch.is_double = random_below(2);
  batch.result = types[random_below(batch.is_double ? 4 : 3)];
  batch.means = random_below(2) ? kBF16 : batch.is_double ? kF64 : kF32;
  batch.scale = 0.9;
  std::vector<Tensor> tensors;
  for (std::int64_t left = batch.segments = random_below(10); left; --left) tensors.emplace_back(random_length(), batch);
  const Case cases[] = {{Act::kSave, false, Case::kNowhere}, {Act::kApply, false, Case::kApart},
                        {Act::kApply, true, Case::kApart},   {Act::kApply, false, Case::kInPlace},
                        {Act::kApply, true, Case::kNowhere}, {Act::kApply, false, Case::kNowhere},
                        {Act::kRestore, true, Case::kApart}};
  for (const std::string& instruction_set : instruction_sets())
    for (const int threads : {1, 4})
      for (const Case& one : cases)
        if (!same_case(batch, tensors, one, threads, instruction_set)) return failed("deltas", round, instruction_set);
  return true;
}

bool same_masks(int round) {
  for (const std::string& instruction_set : instruction_sets()) {
    const DeltaLoop& loop = delta_loop(instruction_set);
    const std::int64_t numel = random_length();
    if (!same_masks_of<F64, F64>(kF64, kF64, numel, loop) || !same_masks_of<F64, BF16>(kF64, kBF16, numel, loop) ||
        !same_masks_of<F32, F32>(kF32, kF32, numel, loop) || !same_masks_of<F32, BF16>(kF32, kBF16, numel, loop))
      return failed("masks", round, instruction_set);
  }
  return true;
}

}  // namespace negmerge
