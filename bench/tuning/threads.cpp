// csrc/merge_cpu.cpp as a library. threads.py builds one for each choice of constants and times them on the same memory.
#include <chrono>

#include "../../csrc/merge_cpu.h"

using namespace negmerge;

// Merges `batches` batches of one segment each, in turn, `calls` times in all, and writes the seconds of each call.
// tables: int64[batches, 3 + n], of batch.h. All streams are of one storage type.
extern "C" void merge_times(int dtype, std::int64_t n, std::int64_t batches, const std::int64_t* tables, int threads,
                            std::int64_t calls, std::int64_t* counts, double* seconds) {
  const std::vector<Dtype> dtypes(n, static_cast<Dtype>(dtype));
  const std::string best = instruction_sets().front();
  Batch batch{dtypes[0], dtypes.data(), n, false, 0.9, n, 1, tables, counts};
  for (std::int64_t call = 0; call < calls; ++call) {
    batch.descriptors = tables + call % batches * (3 + n);
    const auto began = std::chrono::steady_clock::now();
    merge_cpu(batch, threads, best);
    seconds[call] = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  }
}
