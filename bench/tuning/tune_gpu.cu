// The CUDA kernel as a library. tune_gpu.py builds one for each choice of constants.
#include "../../csrc/merge_cuda.cu"

extern "C" std::int64_t tile() { return negmerge::kCudaTile; }
extern "C" std::int64_t table() { return negmerge::kCudaTable; }

// Launches a merge as merge_cuda does. Returns the error, or null.
extern "C" const char* merge_launch(int result, const char* dtypes, std::int64_t models, bool task_vectors, double scale,
                                    std::int64_t required, std::int64_t segments, const std::int64_t* table,
                                    std::int64_t words, std::int64_t* counts, std::int64_t tiles, int device,
                                    std::uint64_t stream) {
  static std::string why;
  const negmerge::Batch batch{static_cast<negmerge::Dtype>(result), reinterpret_cast<const negmerge::Dtype*>(dtypes),
                              models, task_vectors, scale, required, segments, nullptr, counts};
  try {
    negmerge::merge_cuda(batch, table, words, tiles, std::numeric_limits<int>::max(), device, stream);
    return nullptr;
  } catch (const std::exception& error) {
    why = error.what();
    return why.c_str();
  }
}
