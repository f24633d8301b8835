// The CUDA kernel that applies deltas compiled for the host, as a library for ctypes.
#include "../../../csrc/apply_cuda.cu"

extern "C" void apply_on_host(int result, int means, int arithmetic, int act, double scale, std::int64_t segments,
                              const std::int64_t* table, std::int64_t words, std::int64_t* counts, std::int64_t tiles,
                              std::int64_t max_blocks) {
  const auto dtype = [](int code) { return static_cast<negmerge::Dtype>(code); };
  const negmerge::DeltaBatch batch{dtype(result), dtype(means), dtype(arithmetic) == negmerge::kF64, static_cast<negmerge::Act>(act),
                                   scale, segments, nullptr, counts};
  negmerge::apply_cuda(batch, table, words > negmerge::kCudaTable ? 0 : words, tiles, max_blocks, 0, 0);
}
