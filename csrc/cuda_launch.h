// What the launches of the CUDA kernels share, on the host.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "merge_cuda.h"

namespace negmerge {
namespace {

#ifndef NEGMERGE_CUDA_WAVES
#define NEGMERGE_CUDA_WAVES 16
#endif
constexpr int kWaves = NEGMERGE_CUDA_WAVES;  // blocks for each one that runs at a time
constexpr int kMaxWarps = 32;               // of a block

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

// Makes a device the current one, and restores the caller's.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "no current device");
    check(cudaSetDevice(device), "device");
  }
  ~OnDevice() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

void require_on_device(const void* memory, int device, const char* what) {
  cudaPointerAttributes found;
  check(cudaPointerGetAttributes(&found, memory), what);
  if (found.type != cudaMemoryTypeDevice || found.device != device)
    throw std::invalid_argument(std::string(what) + " is not in the memory of CUDA device " + std::to_string(device));
}

// The blocks of a kernel that run on a device at a time.
template <class Kernel>
std::int64_t blocks_at_a_time(Kernel kernel, int threads, int device) {
  int processors = 0, resident = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "device");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, 0), "no code for this device");
  return std::int64_t{processors} * resident;
}

// A batch's table, and where and how often a kernel runs.
struct Launch {
  const std::int64_t* table;
  std::int64_t words, tiles, max_blocks;  // words: of a table in main memory, which goes along with the launch; else 0
  int device;
  cudaStream_t stream;

  // Raises for what no launch can do. entries: of a table.
  void require(std::int64_t entries) const {
    if (words > kCudaTable) throw std::invalid_argument("the table does not go along with a launch");
    if (std::max(tiles, entries) >= std::numeric_limits<int>::max() - kMaxWarps) throw std::invalid_argument("a batch for several launches");
    if (!words) require_on_device(table, device, "the table");
  }

  // Gives a kernel its arguments and the table. tiles_of_block: those that a block takes at once.
  template <class Args>
  void run(void (*kernel)(Args), Args& args, int threads, int tiles_of_block = 1) const {
    args.memory = words ? nullptr : table;
    args.tiles = static_cast<int>(tiles);
    std::copy_n(table, words, args.table);
    const std::int64_t full = (tiles + tiles_of_block - 1) / tiles_of_block;
    const auto blocks = static_cast<unsigned>(std::min({full, max_blocks, blocks_at_a_time(kernel, threads, device) * kWaves}));
    void* arguments[] = {&args};
    check(cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), arguments, 0, stream), "launch");
  }
};

}  // namespace
}  // namespace negmerge
