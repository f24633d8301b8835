// The CUDA kernel compiled for the host, as a library for ctypes.
#include "../../../csrc/merge_cuda.cu"

extern "C" void merge_on_host(int result, const char* dtypes, std::int64_t models, bool task_vectors, double scale,
                              std::int64_t required, std::int64_t segments, const std::int64_t* table,
                              std::int64_t words, std::int64_t* counts, std::int64_t tiles, std::int64_t max_blocks) {
  const negmerge::Batch batch{static_cast<negmerge::Dtype>(result), reinterpret_cast<const negmerge::Dtype*>(dtypes),
                              models, task_vectors, scale, required, segments, nullptr, counts};
  negmerge::merge_cuda(batch, table, words > negmerge::kCudaTable ? 0 : words, tiles, max_blocks, 0, 0);
}

extern "C" std::int64_t tile() { return negmerge::kCudaTile; }
