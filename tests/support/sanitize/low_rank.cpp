// Low-rank differences, as main.cpp does merges: written, and merged beside ordinary models.
#include "../../../csrc/low_rank.h"

#include <cmath>
#include <cstdio>

#include "../../../csrc/merge_cpu.h"
#include "memory.h"

namespace negmerge {
namespace {

// A difference of some elements of a tensor, at any address that its numbers may have.
struct Factors {
  std::vector<char> left, right, panels;
  Expansion expansion;

  Factors(bool is_double, std::int64_t matrices, std::int64_t rows, std::int64_t columns, std::int64_t begin) {
    const std::int64_t rank = 1 + random_below(random_below(4) ? 9 : 70), size = is_double ? 8 : 4;
    const auto fill = [&](std::vector<char>& memory, std::int64_t count) {
      memory.resize(count * size);
      for (std::int64_t i = 0; i < count; ++i) {
        double number = (random_below(2001) - 1000) * (random_below(40) ? 0x1p-10 : random_below(2) ? 0x1p-140 : 0x1p120);
        if (!random_below(200)) number = random_below(2) ? INFINITY : NAN;
        const auto narrow = static_cast<float>(number);
        std::memcpy(&memory[i * size], is_double ? static_cast<const void*>(&number) : &narrow, size);
      }
    };
    fill(left, matrices * rows * rank);
    fill(right, matrices * rank * columns);
    expansion = {left.data(), right.data(), matrices, rows, columns, rank, 0.5 * (1 + random_below(3)), nullptr, begin};
    if (random_below(2)) pack(size);
  }

  // Right factors in panels, as a caller may have them.
  void pack(std::int64_t size) {
    const std::int64_t of_matrix = (expansion.columns * size + kPanel - 1) / kPanel * expansion.rank * kPanel;
    panels.resize(expansion.matrices * of_matrix);
    for (std::int64_t i = 0; i < expansion.matrices; ++i) pack_panels(expansion, size, i, 0, expansion.columns, &panels[i * of_matrix]);
    expansion.panels = panels.data();
  }
};

// d of element i of an expansion.
template <class T>
T plain_difference(const Expansion& e, std::int64_t i) {
  i += e.begin;
  const std::int64_t row = i / e.columns, matrix = row / e.rows, column = i % e.columns;
  T sum = 0;
  for (std::int64_t r = 0; r < e.rank; ++r) {
    const T product = read<T>(e.left + (row * e.rank + r) * sizeof(T)) * read<T>(e.right + ((matrix * e.rank + r) * e.columns + column) * sizeof(T));
    sum = sum + product;
  }
  return static_cast<T>(e.scale) * sum;
}

// Writes d, or b + d in type S.
template <class T>
void expand_plainly(const Expansion& e, Dtype result, const char* base, char* out, std::int64_t numel) {
  for (std::int64_t i = 0; i < numel; ++i) {
    const T d = plain_difference<T>(e, i);
    if (!base) {
      std::memcpy(out + i * sizeof d, &d, sizeof d);
      continue;
    }
    with_type(result, [&](auto s) {
      using S = decltype(s);
      const auto x = static_cast<typename S::Float>(number<T, S>(base + i * sizeof(typename S::Bits)) + d);
      auto bits = static_cast<typename S::Bits>(S::template round<typename S::Word>(x));
      constexpr auto infinity = static_cast<typename S::Bits>(((std::uint64_t{1} << S::kExponent) - 1) << S::kFraction);
      if (!in_range<S>(x) && sizeof x != sizeof bits)
        bits = x == x ? infinity | static_cast<typename S::Bits>(std::uint64_t{std::signbit(x)} << (8 * sizeof bits - 1)) : infinity | 1;
      std::memcpy(out + i * sizeof bits, &bits, sizeof bits);
    });
  }
}
void expand_plainly(bool is_double, const Expansion& e, Dtype result, const char* base, char* out, std::int64_t numel) {
  is_double ? expand_plainly<double>(e, result, base, out, numel) : expand_plainly<float>(e, result, base, out, numel);
}

// Equal, or both NaN.
bool same_numbers(Dtype dtype, const Memory& found, const Memory& expected) {
  for (std::int64_t i = 0; i < found.size; i += kSizes[dtype])
    if (std::memcmp(found.at + i, expected.at + i, kSizes[dtype]) &&
        !with_type(dtype, [&](auto s) {
          const auto x = number<double, decltype(s)>(found.at + i), y = number<double, decltype(s)>(expected.at + i);
          return x != x && y != y;
        }))
      return false;
  return true;
}

struct Shape {
  std::int64_t matrices = 1 + random_below(3), rows = 1 + random_below(random_below(2) ? 9 : 120),
               columns = 1 + random_below(random_below(2) ? 9 : 300);
  std::int64_t begin = random_below(matrices * rows * columns), numel = 1 + random_below(matrices * rows * columns - begin);
};

bool same_expanded(int round) {
  const bool is_double = random_below(2), adds = random_below(3);
  const Dtype wide = is_double ? kF64 : kF32, types[] = {kF32, kF16, kBF16, kF64};
  const Dtype result = adds ? types[random_below(is_double ? 4 : 3)] : wide;
  std::vector<std::int64_t> rows;
  std::vector<Factors> factors;
  std::vector<Memory> bases, outs, expected;
  const std::int64_t segments = random_below(6);
  factors.reserve(segments);
  for (std::int64_t i = 0; i < segments; ++i) {
    const Shape shape;
    factors.emplace_back(is_double, shape.matrices, shape.rows, shape.columns, shape.begin);
    for (auto* memories : {&bases, &outs, &expected}) memories->emplace_back(shape.numel * kSizes[result]);
    bases.back().fill(result);
    const char* base = adds ? bases.back().at : nullptr;
    expand_plainly(is_double, factors.back().expansion, result, base, expected.back().at, shape.numel);
    rows.insert(rows.end(), {shape.numel, reinterpret_cast<std::int64_t>(base), outs.back().address()});
    const auto* fields = reinterpret_cast<const std::int64_t*>(&factors.back().expansion);
    rows.insert(rows.end(), fields, fields + sizeof(Expansion) / 8);
  }
  for (const std::string& instruction_set : instruction_sets())
    for (const int threads : {1, 4}) {
      for (Memory& out : outs) std::memset(out.at, 0xa5, out.size);
      expand_cpu({is_double, adds, result, segments, rows.data()}, threads, instruction_set);
      for (std::int64_t i = 0; i < segments; ++i)
        if (!same_numbers(result, outs[i], expected[i])) {
          std::printf("low rank, round %d: %s on %d threads differs from the rule\n", round, instruction_set.c_str(), threads);
          return false;
        }
    }
  return true;
}

// Merged as they are, and expanded before.
bool same_merged(int round) {
  const Dtype types[] = {kF32, kF16, kBF16, kF64};
  const std::int64_t n = 1 + random_below(12), segments = 1 + random_below(4);
  Batch batch{};
  batch.result = types[random_below(4)];
  batch.task_vectors = random_below(2);
  const bool is_double = batch.result == kF64 || (batch.task_vectors && random_below(2));
  const Dtype wide = is_double ? kF64 : kF32;
  const std::vector<Dtype> dtypes(n, batch.task_vectors ? wide : batch.result);
  batch.dtypes = dtypes.data();
  batch.n = n;
  batch.consensus = random_below(2);
  batch.scale = batch.consensus ? -1 : 0.9;
  batch.required = random_below(2) ? n : n / 2 + 1;
  batch.segments = segments;
  std::vector<std::int64_t> rows, dense_rows, expansions(segments * n);
  std::vector<Factors> factors;
  std::vector<Memory> bases, outs, models;
  factors.reserve(segments * n);
  for (std::int64_t i = 0; i < segments; ++i) {
    const Shape shape;
    bases.emplace_back(shape.numel * kSizes[batch.result]);
    bases.back().fill(batch.result);
    outs.emplace_back(shape.numel * kSizes[batch.consensus ? wide : batch.result]);
    const bool has_base = !batch.task_vectors || random_below(3), counted = !random_below(5);
    rows.insert(rows.end(), {shape.numel, has_base ? bases.back().address() : 0, counted ? 0 : outs.back().address()});
    dense_rows.insert(dense_rows.end(), rows.end() - 3, rows.end());
    for (std::int64_t k = 0; k < n; ++k) {
      models.emplace_back(shape.numel * kSizes[dtypes[k]]);
      dense_rows.push_back(models.back().address());
      if (!random_below(4)) {
        models.back().fill(dtypes[k]);
        rows.push_back(models.back().address());
        continue;
      }
      // Now and then of another shape.
      const bool is_flat = !random_below(5);
      factors.emplace_back(is_double, is_flat ? 1 : shape.matrices, is_flat ? shape.matrices * shape.rows * shape.columns : shape.rows,
                           is_flat ? 1 : shape.columns, shape.begin);
      const Expansion& e = factors.back().expansion;
      expand_plainly(is_double, e, batch.result, batch.task_vectors ? nullptr : bases.back().at, models.back().at, shape.numel);
      expansions[i * n + k] = expansions.size();
      const auto* fields = reinterpret_cast<const std::int64_t*>(&e);
      expansions.insert(expansions.end(), fields, fields + sizeof e / 8);
      rows.push_back(0);
    }
  }
  const auto results_of = [&](const std::vector<std::int64_t>& descriptors, const std::int64_t* low_rank, int threads, const std::string& name) {
    std::vector<std::int64_t> counts(kCounted * segments);
    batch.counts = counts.data();
    batch.descriptors = descriptors.data();
    batch.expansions = low_rank;
    for (Memory& out : outs) std::memset(out.at, 0xa5, out.size);
    merge_cpu(batch, threads, name);
    std::vector<char> written;
    for (const Memory& out : outs) written.insert(written.end(), out.at, out.at + out.size);
    return std::pair(counts, written);
  };
  const auto expected = results_of(dense_rows, nullptr, 1, "baseline");
  for (const std::string& instruction_set : instruction_sets())
    for (const int threads : {1, 4})
      if (results_of(rows, expansions.data(), threads, instruction_set) != expected) {
        std::printf("low rank merged, round %d: %s on %d threads differs\n", round, instruction_set.c_str(), threads);
        return false;
      }
  return true;
}

}  // namespace

bool same_low_rank(int round) { return same_expanded(round) && same_merged(round); }

}  // namespace negmerge
