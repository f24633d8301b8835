// What the launches of the CUDA kernels share, on the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace negmerge {
namespace {

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

}  // namespace
}  // namespace negmerge
