// The CUDA kernel for low-rank differences compiled for the host, as a library for ctypes.
#include "../../../csrc/expand_cuda.cu"

extern "C" void expand_on_host(int result, bool is_double, std::int64_t boxes, const std::int64_t* table, std::int64_t words,
                               std::int64_t tiles, std::int64_t max_blocks) {
  negmerge::expand_cuda(static_cast<negmerge::Dtype>(result), is_double, boxes, table, words > negmerge::kCudaTable ? 0 : words, tiles,
                        max_blocks, 0, 0);
}

extern "C" int tile_rows() { return negmerge::kExpandRows; }
extern "C" int tile_columns() { return negmerge::kExpandColumns; }
