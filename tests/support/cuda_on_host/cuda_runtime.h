// The part of CUDA's runtime that csrc/*.cu use, on the host: a launch runs the warps of the grid one by one. The threads of a warp
// take turns: each runs until they exchange values, or synchronize.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)
#define __noinline__
#define __builtin_assume(...)

struct dim3 {
  unsigned x;
  explicit dim3(unsigned x = 1) : x(x) {}
};
inline dim3 gridDim, blockIdx, threadIdx;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
template <class V>
V __ldcs(const V* from) { return *from; }
template <class V>
V __ldg(const V* from) { return *from; }

enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaMemoryType { cudaMemoryTypeDevice };
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
};
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void*) {
  *found = {cudaMemoryTypeDevice, 0};
  return cudaSuccess;
}
// One processor, which runs one block at a time: segments of many tiles begin and end in the middle of a block's.
inline cudaError_t cudaDeviceGetAttribute(int* count, cudaDeviceAttr, int) { return *count = 1, cudaSuccess; }
template <class K>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, K, int, std::size_t) {
  return *count = 1, cudaSuccess;
}

// The threads of the warp that runs. A thread's n-th exchange is with the n-th of the others.
struct Warp {
  static constexpr int kThreads = 32;
  static constexpr std::size_t kStack = 1 << 18;
  ucontext_t scheduler, threads[kThreads];
  std::vector<char> stacks = std::vector<char>(kThreads * kStack);
  int values[2][kThreads], exchanges[kThreads];
  bool ended[kThreads];
  unsigned first;  // thread of the block
  std::function<void()> body;

  int thread() const { return static_cast<int>(threadIdx.x - first); }
};
inline Warp warp;

// Gives a value to the other threads of the warp, and waits for theirs.
inline const int* exchange(int value) {
  const int thread = warp.thread();
  int* const values = warp.values[warp.exchanges[thread]++ % 2];
  values[thread] = value;
  swapcontext(&warp.threads[thread], &warp.scheduler);
  return values;
}
inline void run_thread() {
  warp.body();
  warp.ended[warp.thread()] = true;
}
inline void run_warp(unsigned first, const std::function<void()>& body) {
  warp.first = first;
  warp.body = body;
  for (int thread = 0; thread < Warp::kThreads; ++thread) {
    warp.ended[thread] = false;
    warp.exchanges[thread] = 0;
    getcontext(&warp.threads[thread]);
    warp.threads[thread].uc_stack = {&warp.stacks[thread * Warp::kStack], 0, Warp::kStack};
    warp.threads[thread].uc_link = &warp.scheduler;
    makecontext(&warp.threads[thread], run_thread, 0);
  }
  while (!warp.ended[0]) {
    for (int thread = 0; thread < Warp::kThreads; ++thread) {
      threadIdx.x = first + thread;
      swapcontext(&warp.scheduler, &warp.threads[thread]);
    }
    for (int thread = 1; thread < Warp::kThreads; ++thread)  // a GPU would hang, or worse
      if (warp.ended[thread] != warp.ended[0] || warp.exchanges[thread] != warp.exchanges[0]) std::abort();
  }
}

inline int __reduce_add_sync(unsigned, int value) {
  const int* const values = exchange(value);
  return std::accumulate(values, values + Warp::kThreads, 0);
}
inline int __shfl_sync(unsigned, int value, int thread) { return exchange(value)[thread]; }
inline int __shfl_up_sync(unsigned, int value, int distance) {
  const int thread = warp.thread();
  return exchange(value)[thread < distance ? thread : thread - distance];
}
inline void __syncwarp() { exchange(0); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline void atomicAdd(unsigned long long* to, unsigned long long value) { *to += value; }

template <class A>
cudaError_t cudaLaunchKernel(void (*kernel)(A), dim3 grid, dim3 block, void** arguments, std::size_t, cudaStream_t) {
  gridDim = grid;
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
    for (unsigned first = 0; first < block.x; first += Warp::kThreads)
      run_warp(first, [&] { kernel(*static_cast<A*>(arguments[0])); });
  return cudaSuccess;
}
