// The part of CUDA's runtime that csrc/merge_cuda.cu uses, on the host: a launch runs all threads of the grid one by one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
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

// The sums of a warp: a thread's n-th call adds to the n-th sum. Thread 0 runs last, when the sums are complete.
struct Warp {
  std::vector<int> sums;
  std::size_t call = 0;
};
inline Warp warp;
inline int __reduce_add_sync(unsigned, int value) {
  if (warp.call == warp.sums.size()) warp.sums.push_back(0);
  return warp.sums[warp.call++] += value;
}
inline void atomicAdd(unsigned long long* to, unsigned long long value) { *to += value; }

template <class A>
cudaError_t cudaLaunchKernel(void (*kernel)(A), dim3 grid, dim3 block, void** arguments, std::size_t, cudaStream_t) {
  gridDim = grid;
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
    for (unsigned first = 0; first < block.x; first += 32) {
      warp = {};
      for (unsigned thread = 32; thread-- > 0;) {
        threadIdx.x = first + thread;
        warp.call = 0;
        kernel(*static_cast<A*>(arguments[0]));
      }
    }
  return cudaSuccess;
}
