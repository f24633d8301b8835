// The CPU kernel: the choice of an instruction set, and the threads that merge a batch.
#include "merge_cpu.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <thread>

#include "arithmetic.h"
#include "merge_loop.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace negmerge {

void merge_loop_baseline(const Batch&, Position, std::int64_t, bool);
#ifdef __x86_64__
void merge_loop_avx2(const Batch&, Position, std::int64_t, bool);
void merge_loop_avx512(const Batch&, Position, std::int64_t, bool);
#endif

namespace {

// bench/tuning/threads.py compiles others, and measures what two threads are worth; these won, bench/results/threads.jsonl.
#ifndef NEGMERGE_MAX_AT_ONCE
#define NEGMERGE_MAX_AT_ONCE (1 << 20)
#endif
#ifndef NEGMERGE_MIN_AT_ONCE
#define NEGMERGE_MIN_AT_ONCE 4096
#endif
#ifndef NEGMERGE_BYTES_PER_THREAD
#define NEGMERGE_BYTES_PER_THREAD (1 << 21)
#endif
#ifndef NEGMERGE_IN_CACHE
#define NEGMERGE_IN_CACHE (1 << 20)
#endif
// Elements of a chunk: enough that taking one costs nothing to speak of, few enough that threads end together.
constexpr std::int64_t kMaxAtOnce = NEGMERGE_MAX_AT_ONCE, kMinAtOnce = NEGMERGE_MIN_AT_ONCE;
// With fewer bytes for each thread, fewer threads are faster: starting one takes as long.
constexpr std::int64_t kBytesPerThread = NEGMERGE_BYTES_PER_THREAD;
// What is probably in a cache: an output of a batch so small is soon read again.
constexpr std::int64_t kInCache = NEGMERGE_IN_CACHE;
constexpr int kMaxThreads = 1024;

struct NamedLoop {
  const char* name;
  Loop loop;
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
      loops.push_back({"avx512", merge_loop_avx512});
    if (avx2) loops.push_back({"avx2", merge_loop_avx2});
#endif
    loops.push_back({"baseline", merge_loop_baseline});
    return loops;
  }();
  return found;
}

// All elements of a batch, cut into chunks that the threads take one after another.
class Partition {
 public:
  Partition(const Batch& batch, int threads) : batch_(batch), ends_(batch.segments) {
    std::int64_t end = 0;
    for (std::int64_t i = 0; i < batch.segments; ++i) ends_[i] = end += batch.row(i)[0];
    chunk_ = std::clamp(end / (8 * threads) / 1024 * 1024, kMinAtOnce, kMaxAtOnce);
  }

  std::int64_t elements() const { return ends_.empty() ? 0 : ends_.back(); }

  void process(Loop loop, bool in_cache) {
    const PlainArithmetic plain;
    for (std::int64_t at; (at = next_.fetch_add(chunk_, std::memory_order_relaxed)) < elements();) {
      const std::int64_t segment = std::upper_bound(ends_.begin(), ends_.end(), at) - ends_.begin();
      const std::int64_t start = at - (segment ? ends_[segment - 1] : 0);
      loop(batch_, {segment, start}, std::min(chunk_, elements() - at), in_cache);
    }
  }

 private:
  const Batch& batch_;
  std::vector<std::int64_t> ends_;
  std::int64_t chunk_;
  std::atomic<std::int64_t> next_{0};
};

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

void merge_cpu(const Batch& batch, int threads, const std::string& instruction_set) {
  Loop loop = nullptr;
  for (const NamedLoop& each : loops())
    if (each.name == instruction_set) loop = each.loop;
  if (!loop) throw std::invalid_argument("no instruction set " + instruction_set + " here");

  threads = std::clamp(threads, 1, kMaxThreads);
  Partition partition(batch, threads);
  const std::int64_t bytes = partition.elements() * bytes_per_element(batch);
  const std::int64_t wanted = std::min<std::int64_t>(threads, bytes / kBytesPerThread);
  const bool in_cache = bytes <= kInCache;
  std::vector<std::thread> helpers;
  try {
    for (std::int64_t i = 1; i < wanted; ++i) helpers.emplace_back([&] { partition.process(loop, in_cache); });
  } catch (const std::exception&) {
    // The system has no more threads or no memory for them: fewer threads merge the batch.
  }
  partition.process(loop, in_cache);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace negmerge
