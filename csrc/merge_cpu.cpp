// The CPU kernel: the choice of an instruction set, and the threads that merge a batch.
#include "merge_cpu.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "low_rank.h"
#include "threads.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace negmerge {

void merge_loop_baseline(const Batch&, Position, std::int64_t, bool);
void family_loop_baseline(const Batch&, Position, std::int64_t, bool);
#ifdef __x86_64__
void merge_loop_avx2(const Batch&, Position, std::int64_t, bool);
void merge_loop_avx512(const Batch&, Position, std::int64_t, bool);
void family_loop_avx2(const Batch&, Position, std::int64_t, bool);
void family_loop_avx512(const Batch&, Position, std::int64_t, bool);
#endif

namespace {

struct NamedLoop {
  const char* name;
  Loop merge, family;
};

#ifdef __x86_64__
// Not every compiler's __builtin_cpu_supports knows F16C.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}
#endif

// Best first. Found once: on a virtual machine, asking the processor takes longer than a small merge.
const std::vector<NamedLoop>& loops() {
  static const std::vector<NamedLoop> found = [] {
    std::vector<NamedLoop> loops;
#ifdef __x86_64__
    const bool avx2 = __builtin_cpu_supports("avx2") && has_f16c();
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      loops.push_back({"avx512", merge_loop_avx512, family_loop_avx512});
    if (avx2) loops.push_back({"avx2", merge_loop_avx2, family_loop_avx2});
#endif
    loops.push_back({"baseline", merge_loop_baseline, family_loop_baseline});
    return loops;
  }();
  return found;
}

std::int64_t bytes_per_element(const Batch& batch) {
  std::int64_t bytes = kSizes[batch.result];
  for (std::int64_t k = 0; k < batch.n; ++k) bytes += kSizes[batch.dtypes[k]];
  return bytes;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const NamedLoop& each : loops()) names.push_back(each.name);
  return names;
}

std::string asked_instruction_set() {
  const char* asked = std::getenv("NEGMERGE_CPU");
  return asked ? asked : loops().front().name;
}

Loop loop_for(const Batch& batch, const std::string& instruction_set) {
  for (const NamedLoop& each : loops())
    if (each.name == instruction_set) return batch.family ? each.family : each.merge;
  throw std::invalid_argument("no instruction set " + instruction_set + " here");
}

void merge_cpu(const Batch& batch, int threads, const std::string& instruction_set) {
  if (batch.expansions) return merge_low_rank(batch, threads, instruction_set);
  const Loop loop = loop_for(batch, instruction_set);
  threads = std::clamp(threads, 1, kMaxThreads);
  Partition partition(batch.segments, threads, [&](std::int64_t i) { return batch.row(i)[0]; });
  const std::int64_t bytes = partition.elements() * bytes_per_element(batch);
  run_on_threads(threads, bytes, [&] {
    partition.run([&](std::int64_t segment, std::int64_t start, std::int64_t elements) {
      loop(batch, {segment, start}, elements, bytes <= kInCache);
    });
  });
}

}  // namespace negmerge
