// The CUDA kernel of the other methods compiled for the host, as a library for ctypes.
#include "../../../csrc/family_cuda.cu"

extern "C" void family_on_host(int result, const char* dtypes, std::int64_t models, bool task_vectors, double scale,
                               std::int64_t required, std::int64_t segments, int gate, int election, int reduction,
                               std::uint64_t seed, double mask_scale, const double* numbers, const std::int64_t* table,
                               std::int64_t words, std::int64_t* counts, std::int64_t tiles, std::int64_t max_blocks) {
  const negmerge::Family family{static_cast<negmerge::Gate>(gate), static_cast<negmerge::Election>(election),
                                static_cast<negmerge::Reduction>(reduction), seed, mask_scale, numbers, nullptr};
  negmerge::Batch batch{static_cast<negmerge::Dtype>(result), reinterpret_cast<const negmerge::Dtype*>(dtypes), models, task_vectors,
                        scale, required, segments, nullptr, counts};
  batch.family = &family;
  negmerge::family_cuda(batch, table, words > negmerge::kCudaTable ? 0 : words, tiles, max_blocks, 0, 0);
}

extern "C" std::int64_t tile() { return negmerge::kCudaTile; }
