// The threads of the CPU kernels, and how the elements of a batch are cut into chunks for them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include "arithmetic.h"

namespace negmerge {

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

// All elements of a batch, cut into chunks that the threads take one after another. Chunks begin at multiples of 1024.
class Partition {
 public:
  // size_of: the elements of a segment. least: of a chunk.
  template <class SizeOf>
  Partition(std::int64_t segments, int threads, const SizeOf& size_of, std::int64_t least = kMinAtOnce) : ends_(segments) {
    std::int64_t end = 0;
    for (std::int64_t i = 0; i < segments; ++i) ends_[i] = end += size_of(i);
    chunk_ = std::clamp(end / (8 * threads) / 1024 * 1024, least, kMaxAtOnce);
  }

  std::int64_t elements() const { return ends_.empty() ? 0 : ends_.back(); }

  // Calls process(segment, start, elements) for each chunk: from an element of a segment on, across segments.
  template <class Process>
  void run(const Process& process) {
    const PlainArithmetic plain;
    for (std::int64_t at; (at = next_.fetch_add(chunk_, std::memory_order_relaxed)) < elements();) {
      const std::int64_t segment = std::upper_bound(ends_.begin(), ends_.end(), at) - ends_.begin();
      process(segment, at - (segment ? ends_[segment - 1] : 0), std::min(chunk_, elements() - at));
    }
  }

 private:
  std::vector<std::int64_t> ends_;
  std::int64_t chunk_;
  std::atomic<std::int64_t> next_{0};
};

// Calls process() on at most `threads` threads, this one among them: as many as so many bytes are worth.
template <class Process>
void run_on_threads(int threads, std::int64_t bytes, const Process& process) {
  const std::int64_t wanted = std::min<std::int64_t>(threads, bytes / kBytesPerThread);
  std::vector<std::thread> helpers;
  try {
    for (std::int64_t i = 1; i < wanted; ++i) helpers.emplace_back(process);
  } catch (const std::exception&) {
    // The system has no more threads or no memory for them: fewer threads do the work.
  }
  process();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace negmerge
