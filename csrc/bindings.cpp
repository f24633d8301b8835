// negmerge_fast._native. Addresses and sizes are integers, so that one build works with every version of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "batch.h"
#include "merge_cpu.h"
#ifdef NEGMERGE_WITH_CUDA
#include "merge_cuda.h"
#endif

namespace py = pybind11;

namespace negmerge {
namespace {

Batch batch_of(int result, const std::string& dtypes, bool task_vectors, double scale, std::int64_t required,
               std::int64_t segments, std::uintptr_t descriptors, std::uintptr_t counts) {
  for (const char dtype : dtypes + static_cast<char>(result))
    if (dtype < kF64 || dtype > kBF16) throw std::invalid_argument("no such storage type");
  if (dtypes.empty()) throw std::invalid_argument("no models");
  Batch batch;
  batch.result = static_cast<Dtype>(result);
  batch.dtypes = reinterpret_cast<const Dtype*>(dtypes.data());
  batch.n = static_cast<std::int64_t>(dtypes.size());
  batch.task_vectors = task_vectors;
  batch.scale = scale;
  batch.required = required;
  batch.segments = segments;
  batch.descriptors = reinterpret_cast<const std::int64_t*>(descriptors);
  batch.counts = reinterpret_cast<std::int64_t*>(counts);
  return batch;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The compiled kernels; native.py wraps them.";
  m.attr("instruction_sets") = instruction_sets();
  m.def("asked_instruction_set", asked_instruction_set);
  m.def(
      "merge_cpu",
      [](int result, const std::string& dtypes, bool task_vectors, double scale, std::int64_t required,
         std::int64_t segments, std::uintptr_t descriptors, std::uintptr_t counts, int threads,
         const std::string& instruction_set) {
        merge_cpu(batch_of(result, dtypes, task_vectors, scale, required, segments, descriptors, counts), threads,
                  instruction_set);
      },
      py::call_guard<py::gil_scoped_release>());
#ifdef NEGMERGE_WITH_CUDA
  m.attr("cuda") = true;
  m.attr("cuda_tile") = kCudaTile;
  m.def(
      "merge_cuda",
      [](int result, const std::string& dtypes, bool task_vectors, double scale, std::int64_t required,
         std::int64_t segments, std::uintptr_t memory, std::uintptr_t counts, std::int64_t tiles,
         std::int64_t max_blocks, int device, std::uintptr_t stream) {
        merge_cuda(batch_of(result, dtypes, task_vectors, scale, required, segments, 0, counts),
                   reinterpret_cast<const std::int64_t*>(memory), tiles, max_blocks, device, stream);
      },
      py::call_guard<py::gil_scoped_release>());
#else
  m.attr("cuda") = false;
#endif
}

}  // namespace negmerge
