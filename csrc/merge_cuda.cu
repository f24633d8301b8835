// The CUDA kernel: one launch for a batch.
//
// Blocks take equal numbers of consecutive tiles, so that a batch of one large segment takes as long as one of thousands of
// small ones. A thread takes 16 bytes of the base, and for these elements all models, up to 8 loads under way at once. Each
// thread counts over a segment; a warp adds its sum to the segment's counts.
#include "merge_cuda.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "arithmetic.h"
#include "dtypes.h"
#include "merge_rule.h"

namespace negmerge {
namespace {

// The fastest that bench/tuning/tune_gpu.py found on an H100 (bench/results/tune_gpu.jsonl), with tiles of 2,048 elements: 0.96
// of a device copy, the geometric mean over all types and 2, 8 and 32 models. With 1 wave it was 0.94; then with 4 blocks at a
// time 0.91, with 4 models or 64 bytes at once 0.93.
#ifndef NEGMERGE_CUDA_THREADS
#define NEGMERGE_CUDA_THREADS 256
#endif
#ifndef NEGMERGE_CUDA_GROUP
#define NEGMERGE_CUDA_GROUP 8
#endif
#ifndef NEGMERGE_CUDA_GROUP_BYTES
#define NEGMERGE_CUDA_GROUP_BYTES 128
#endif
#ifndef NEGMERGE_CUDA_BASE_BYTES
#define NEGMERGE_CUDA_BASE_BYTES 16
#endif
#ifndef NEGMERGE_CUDA_WAVES
#define NEGMERGE_CUDA_WAVES 16
#endif
#ifndef NEGMERGE_CUDA_BLOCKS
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
#define NEGMERGE_CUDA_BLOCKS 2  // for others the compiler needs more registers
#else
#define NEGMERGE_CUDA_BLOCKS 3
#endif
#endif
constexpr int kThreads = NEGMERGE_CUDA_THREADS;       // of a block
constexpr int kWaves = NEGMERGE_CUDA_WAVES;           // blocks for each one that runs at a time
constexpr int kGroup = NEGMERGE_CUDA_GROUP;           // models whose loads are under way at once
constexpr int kBaseBytes = NEGMERGE_CUDA_BASE_BYTES;  // of the base, for a thread at a time

// segments: the number of tiles before each segment, and whether all its addresses are multiples of 16. one_type: all
// models are stored as `type`, so that their types need not be loaded. max_blocks: of the launch.
struct Tiling {
  const std::int64_t* segments;
  std::int64_t tiles;
  bool one_type;
  Dtype type;
  std::int64_t max_blocks;
};

// reciprocal: 1 / n, rounded; NaN if n is too large for quick_quotient.
template <class T>
struct KernelArgs {
  Batch batch;
  Tiling tiling;
  Constants<T> constants;
  T reciprocal;
};

// Addresses of one segment.
struct Operands {
  const char* base;
  char* out;
  const std::int64_t* addresses;  // of the models
};

// Blocks that a processor can run at a time, at least: the compiler limits registers for that.
template <bool kSameDtype, class Accumulator>
constexpr int kBlocks = kSameDtype && Accumulator::kResultTells ? NEGMERGE_CUDA_BLOCKS : 1;

// The most bytes of a group: they and the accumulators are held in registers.
template <class Accumulator, int E>
constexpr int kGroupBytes =
    NEGMERGE_CUDA_GROUP_BYTES / (sizeof(Accumulator) > 48 && E > 2 ? 4 : sizeof(Accumulator) > 24 ? 2 : 1);

// Elements of a thread at a time; fewer if their accumulators would not fit the registers.
template <class T, class S>
constexpr int kElements = kBaseBytes / (sizeof(T) == 8 && sizeof(typename S::Bits) == 2 ? 4 : sizeof(typename S::Bits));

// The bits of E neighbouring elements of one type.
template <class M, int E>
struct Elements {
  typename M::Bits bits[E];
};

// The type that one instruction loads or stores, for so many bytes.
template <int bytes> struct Access { using type = uint4; };
template <> struct Access<8> { using type = uint2; };
template <> struct Access<4> { using type = unsigned; };
template <> struct Access<2> { using type = unsigned short; };

// Loads a value that is aligned to 16 bytes or, if it is smaller, to its size. Nothing is read twice, so that it is marked to
// be evicted from the caches first.
template <class V>
__device__ V load(const char* from) {
  using Part = typename Access<sizeof(V)>::type;
  Part parts[sizeof(V) / sizeof(Part)];
#pragma unroll
  for (unsigned i = 0; i < sizeof(V) / sizeof(Part); ++i) parts[i] = __ldcs(reinterpret_cast<const Part*>(from) + i);
  return bits_as<V>(parts);
}

template <class V>
__device__ void store(char* to, const V& value) {
  using Part = typename Access<sizeof(V)>::type;
  Part parts[sizeof(V) / sizeof(Part)];
  memcpy(parts, &value, sizeof value);
#pragma unroll
  for (unsigned i = 0; i < sizeof(V) / sizeof(Part); ++i) __stcs(reinterpret_cast<Part*>(to) + i, parts[i]);
}

// Loads one element at any address: the hardware loads only at multiples of its size.
template <class V>
__device__ V load_anywhere(const char* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % sizeof(V) == 0) return load<V>(from);
  unsigned char bytes[sizeof(V)];
  for (unsigned i = 0; i < sizeof(V); ++i) bytes[i] = __ldcs(reinterpret_cast<const unsigned char*>(from) + i);
  return bits_as<V>(bytes);
}

template <class V>
__device__ void store_anywhere(char* to, const V& value) {
  if (reinterpret_cast<std::uintptr_t>(to) % sizeof(V) == 0) return store(to, value);
  unsigned char bytes[sizeof(V)];
  memcpy(bytes, &value, sizeof value);
  for (unsigned i = 0; i < sizeof(V); ++i) __stcs(reinterpret_cast<unsigned char*>(to) + i, bytes[i]);
}

template <class M, int E>
__device__ Elements<M, E> load_elements(const char* from) {
  using V = Elements<M, E>;
  return E == 1 ? load_anywhere<V>(from) : load<V>(from);
}

template <class T, class M>
__device__ T widen(typename M::Bits bits) {
  return static_cast<T>(M::template widen<typename M::Float>(static_cast<typename M::Word>(bits)));
}

// What d_k of models of type M subtracts: the base, rounded where M does not hold every value of the base's type.
template <class T, class S, class M>
__device__ T origin(typename S::Bits base) {
  const T b = widen<T, S>(base);
  if constexpr (kHolds<M, S>) return b;
  else return static_cast<T>(as_stored<M, typename M::Word>(static_cast<typename M::Float>(b)));
}

// Accumulates G models of storage type M over E elements. All loads come first, before the base is used, whose load is under
// way, too.
template <class T, class S, class M, int E, int G, class Accumulator>
__device__ void accumulate(const std::int64_t* addresses, std::int64_t element, const Elements<S, E>& base, bool task_vectors,
                           Accumulator (&accumulators)[E]) {
  Elements<M, E> x[G];
#pragma unroll
  for (int k = 0; k < G; ++k)
    x[k] = load_elements<M, E>(reinterpret_cast<const char*>(__ldg(addresses + k)) + element * sizeof(typename M::Bits));
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const T from = task_vectors ? T(0) : origin<T, S, M>(base.bits[e]);
#pragma unroll
    for (int k = 0; k < G; ++k) accumulators[e].accumulate(widen<T, M>(x[k].bits[e]) - from);
  }
}

// Accumulates `same` models of one storage type, in groups.
template <class T, class S, class M, int E, class Accumulator>
__device__ void accumulate(const std::int64_t* addresses, std::int64_t same, std::int64_t element, const Elements<S, E>& base,
                           bool task_vectors, Accumulator (&accumulators)[E]) {
  constexpr int fit = kGroupBytes<Accumulator, E> / (E * static_cast<int>(sizeof(typename M::Bits)));
  constexpr int G = fit < kGroup ? fit : kGroup;
  std::int64_t k = 0;
  for (; k + G <= same; k += G) accumulate<T, S, M, E, G>(addresses + k, element, base, task_vectors, accumulators);
  static_assert(G <= 16, "the rest is taken in groups of 8, 4, 2 and 1");
  if constexpr (G > 8) {
    if (same - k >= 8) accumulate<T, S, M, E, 8>(addresses + k, element, base, task_vectors, accumulators), k += 8;
  }
  if constexpr (G > 4) {
    if (same - k >= 4) accumulate<T, S, M, E, 4>(addresses + k, element, base, task_vectors, accumulators), k += 4;
  }
  if constexpr (G > 2) {
    if (same - k >= 2) accumulate<T, S, M, E, 2>(addresses + k, element, base, task_vectors, accumulators), k += 2;
  }
  if constexpr (G > 1) {
    if (same - k >= 1) accumulate<T, S, M, E, 1>(addresses + k, element, base, task_vectors, accumulators);
  }
}

struct Counts {
  int agreed = 0, nonfinite = 0, vetoed = 0;
};

// The smallest sum, by magnitude, that quick_quotient divides, and the largest n.
template <class T>
constexpr T kMinSum = sizeof(T) == 8 ? T(0x1p-1000) : T(0x1p-100);
constexpr std::int64_t kMaxModels = 1 << 20;

// sum / n as IEEE rounds it, in 3 instructions instead of 10 and a branch; n is a whole number. The first quotient is wrong by
// less than 1.5 units in its last place, so that the remainder is exact. The last rounding is wrong only if sum / n is nearer
// than 2^-22 of such a unit to the middle of two numbers, and it is never nearer than 0.5 / n.
template <class T>
__device__ T quick_quotient(T sum, T n, T reciprocal) {
  const T quotient = sum * reciprocal;
  return std::fma(std::fma(-quotient, n, sum), reciprocal, quotient);
}

// Finishes E elements whose results are all finite; then so are their sums, b and every d_k. Returns false, with nothing done,
// if any is not finite or quick_quotient does not apply.
template <class T, class S, class Accumulator, int E>
__device__ bool finish_quickly(const KernelArgs<T>& args, Elements<S, E>& stored, const Accumulator (&accumulators)[E],
                               Counts& counts) {
  Elements<S, E> merged = stored;
  bool sure = true;
  int agreed = 0, vetoed = 0;
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const T mean = quick_quotient(accumulators[e].sum, args.constants.n, args.reciprocal);
    const auto result = static_cast<typename S::Float>(negated_mean(widen<T, S>(stored.bits[e]), mean, args.constants));
    const bool agree = accumulators[e].agree(args.constants);
    sure &= in_range<S>(result) & (!agree | (magnitude(accumulators[e].sum) >= kMinSum<T>));
    if (agree) merged.bits[e] = static_cast<typename S::Bits>(S::template round<typename S::Word>(result));
    agreed += agree;
    vetoed += accumulators[e].vetoed_by_zero(args.constants);
  }
  if (!sure) return false;
  stored = merged;
  counts.agreed += agreed;
  counts.vetoed += vetoed;
  return true;
}

// Accumulates all models of a batch: neighbours of one storage type together.
template <class T, class S, bool kSameDtype, int E, class Accumulator>
__device__ void accumulate_all(const KernelArgs<T>& args, const std::int64_t* addresses, std::int64_t element,
                               const Elements<S, E>& base, Accumulator (&accumulators)[E]) {
  const Batch& batch = args.batch;
  if constexpr (kSameDtype) {
    accumulate<T, S, S, E>(addresses, batch.n, element, base, batch.task_vectors, accumulators);
  } else {
    for (std::int64_t k = 0, same; k < batch.n; k += same) {
      const Dtype dtype = args.tiling.one_type ? args.tiling.type : batch.dtypes[k];
      if (args.tiling.one_type) same = batch.n;
      else for (same = 1; k + same < batch.n && batch.dtypes[k + same] == dtype;) ++same;
      switch (dtype) {
        case kF64:
          if constexpr (sizeof(T) == 8)
            accumulate<T, S, F64, E>(addresses + k, same, element, base, batch.task_vectors, accumulators);
          break;
        case kF32: accumulate<T, S, F32, E>(addresses + k, same, element, base, batch.task_vectors, accumulators); break;
        case kF16: accumulate<T, S, F16, E>(addresses + k, same, element, base, batch.task_vectors, accumulators); break;
        case kBF16: accumulate<T, S, BF16, E>(addresses + k, same, element, base, batch.task_vectors, accumulators); break;
      }
    }
  }
}

// Merges E elements of a segment.
template <class T, class S, bool kSameDtype, class Accumulator, int E>
__device__ void merge(const KernelArgs<T>& args, const Operands& operands, std::int64_t element, Counts& counts) {
  const std::int64_t offset = element * sizeof(typename S::Bits);
  Elements<S, E> stored = {};
  if (operands.base) stored = load_elements<S, E>(operands.base + offset);
  Accumulator accumulators[E];
  accumulate_all<T, S, kSameDtype, E>(args, operands.addresses, element, stored, accumulators);
  bool done = false;
  if constexpr (Accumulator::kResultTells) done = finish_quickly<T, S, Accumulator, E>(args, stored, accumulators, counts);
  if (!done) {
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const auto outcome = finish<S>(stored.bits[e], accumulators[e], args.constants);
      stored.bits[e] = outcome.bits;
      counts.agreed += outcome.agreed;
      counts.nonfinite += !outcome.finite;
      counts.vetoed += outcome.vetoed;
    }
  }
  if (!operands.out) return;
  E == 1 ? store_anywhere(operands.out + offset, stored) : store(operands.out + offset, stored);
}

__device__ void add_for_warp(std::int64_t* to, int count) {
  const int total = __reduce_add_sync(0xffffffffu, count);
  if (threadIdx.x % 32 == 0 && total) atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(total));
}

// kSameDtype: the models are stored as the base is.
template <class T, class S, bool kSameDtype, template <class, class> class Accumulator>
__global__ void __launch_bounds__(kThreads, kBlocks<kSameDtype, Accumulator<T, T>>)
    merge_tiles(const __grid_constant__ KernelArgs<T> args) {
  constexpr int E = kElements<T, S>;
  static_assert(kCudaTile % 16 == 0 && kCudaTile % E == 0, "a tile begins where a thread may load");
  const Batch& batch = args.batch;
  const std::int64_t* segments = args.tiling.segments;
  const std::int64_t tiles = args.tiling.tiles;
  std::int64_t tile = tiles * blockIdx.x / gridDim.x;
  const std::int64_t end = tiles * (blockIdx.x + 1) / gridDim.x;

  // Binary search for the segment of the first tile.
  std::int64_t segment = 0;
  for (std::int64_t high = batch.segments; high - segment > 1;) {
    const std::int64_t middle = (segment + high) / 2;
    (segments[2 * middle] <= tile ? segment : high) = middle;
  }
  while (tile < end) {
    const std::int64_t first = segments[2 * segment], next = segments[2 * segment + 2];
    const std::int64_t last = next < end ? next : end;
    const std::int64_t* row = batch.row(segment);
    const Operands operands{reinterpret_cast<const char*>(row[1]), reinterpret_cast<char*>(row[2]), row + 3};
    Counts counts;
    const std::int64_t whole = (last - first) * kCudaTile, stop = whole < row[0] ? whole : row[0];
    std::int64_t element = (tile - first) * kCudaTile;
    if (segments[2 * segment + 1]) {
      std::int64_t own = element + threadIdx.x * E;
      for (; own + E <= stop; own += kThreads * E) merge<T, S, kSameDtype, Accumulator<T, T>, E>(args, operands, own, counts);
      element = stop - stop % E;
    }
    for (std::int64_t own = element + threadIdx.x; own < stop; own += kThreads)
      merge<T, S, kSameDtype, Accumulator<T, T>, 1>(args, operands, own, counts);
    std::int64_t* to = batch.counts + kCounted * segment;
    add_for_warp(to, counts.agreed);
    add_for_warp(to + 1, counts.nonfinite);
    add_for_warp(to + 2, counts.vetoed);
    tile = last;
    ++segment;
  }
}

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

template <class T, class S, bool kSameDtype, template <class, class> class Accumulator>
void launch(const Batch& batch, const Tiling& tiling, int device, cudaStream_t stream) {
  const auto n = static_cast<T>(batch.n);
  const T reciprocal = batch.n <= kMaxModels ? T(1) / n : std::numeric_limits<T>::quiet_NaN();
  const Constants<T> constants{static_cast<T>(batch.scale), n, static_cast<T>(batch.required),
                               static_cast<T>(batch.n - batch.required)};
  KernelArgs<T> args{batch, tiling, constants, reciprocal};
  void (*const kernel)(KernelArgs<T>) = merge_tiles<T, S, kSameDtype, Accumulator>;
  int processors = 0, resident = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "device");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0), "no code for this device");
  const auto blocks =
      static_cast<unsigned>(std::min({tiling.tiles, tiling.max_blocks, std::int64_t{processors} * resident * kWaves}));
  void* arguments[] = {&args};
  check(cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), arguments, 0, stream), "launch");
}

template <class T, class S, bool kSameDtype>
void launch(const Batch& batch, const Tiling& tiling, int device, cudaStream_t stream) {
  if (batch.required == batch.n) launch<T, S, kSameDtype, Unanimous>(batch, tiling, device, stream);
  else launch<T, S, kSameDtype, Majority>(batch, tiling, device, stream);
}

template <class T, class S>
void launch(const Batch& batch, const Tiling& tiling, int device, cudaStream_t stream) {
  if constexpr (sizeof(T) == sizeof(typename S::Float)) {
    if (tiling.one_type && tiling.type == batch.result) return launch<T, S, true>(batch, tiling, device, stream);
  }
  launch<T, S, false>(batch, tiling, device, stream);
}

template <class T>
void launch(const Batch& batch, const Tiling& tiling, int device, cudaStream_t stream) {
  switch (batch.result) {
    case kF64:
      if constexpr (sizeof(T) == 8) launch<T, F64>(batch, tiling, device, stream);
      break;
    case kF32: launch<T, F32>(batch, tiling, device, stream); break;
    case kF16: launch<T, F16>(batch, tiling, device, stream); break;
    case kBF16: launch<T, BF16>(batch, tiling, device, stream); break;
  }
}

}  // namespace

void merge_cuda(const Batch& batch, const std::int64_t* memory, std::int64_t tiles, std::int64_t max_blocks, int device,
                std::uint64_t stream_address) {
  if (!tiles) return;
  const OnDevice current(device);
  const PlainArithmetic plain;  // λ is rounded here
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  require_on_device(memory, device, "the descriptors");
  require_on_device(batch.counts, device, "the memory for the counts");
  Batch on_device = batch;
  on_device.descriptors = memory + 2 * (batch.segments + 1);
  on_device.dtypes = reinterpret_cast<const Dtype*>(on_device.row(batch.segments));
  const auto* types = batch.dtypes;
  const bool one_type = std::all_of(types, types + batch.n, [=](Dtype dtype) { return dtype == types[0]; });
  const Tiling tiling{memory, tiles, one_type, types[0], max_blocks};
  is_double(batch) ? launch<double>(on_device, tiling, device, stream) : launch<float>(on_device, tiling, device, stream);
}

}  // namespace negmerge
