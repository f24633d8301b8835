// negmerge_fast._native. Addresses and sizes are integers, so that one build works with every version of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arithmetic.h"
#include "batch.h"
#include "delta.h"
#include "low_rank.h"
#include "magnitudes.h"
#include "merge_chunk.h"
#include "merge_cpu.h"
#include "prefix.h"
#ifdef NEGMERGE_WITH_CUDA
#include "apply_cuda.h"
#include "expand_cuda.h"
#include "family_cuda.h"
#include "merge_cuda.h"
#endif

namespace py = pybind11;

namespace negmerge {
namespace {

Dtype dtype_of(int code) {
  if (code < kF64 || code > kBF16) throw std::invalid_argument("no such storage type");
  return static_cast<Dtype>(code);
}

Batch batch_of(int result, const std::string& dtypes, bool task_vectors, double scale, std::int64_t required,
               std::int64_t segments, std::uintptr_t descriptors, std::uintptr_t counts) {
  for (const char dtype : dtypes) dtype_of(dtype);
  if (dtypes.empty()) throw std::invalid_argument("no models");
  Batch batch;
  batch.result = dtype_of(result);
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

// What a Family has, in its order; the last two are addresses.
using FamilyArguments = std::tuple<int, int, int, std::uint64_t, double, std::uintptr_t, std::uintptr_t>;

Family family_of(const FamilyArguments& arguments) {
  const auto& [gate, election, reduction, seed, mask_scale, numbers, terms] = arguments;
  if (gate < kNoGate || gate > kRandom || election < kAll || election > kMasks || reduction < kSum || reduction > kLargest)
    throw std::invalid_argument("no such choices");
  return {static_cast<Gate>(gate), static_cast<Election>(election), static_cast<Reduction>(reduction), seed, mask_scale,
          reinterpret_cast<const double*>(numbers), reinterpret_cast<const std::int64_t*>(terms)};
}

// A batch of a chunk: the arguments of batch_of, the address of its expansions, or 0, and the family's, if it is merged by that.
using BatchArguments = std::tuple<int, py::bytes, bool, double, std::int64_t, std::int64_t, std::uintptr_t, std::uintptr_t, std::uintptr_t,
                                  std::optional<FamilyArguments>>;

// sources: the address of int64[versions, 4], with the descriptor of a file, an offset, a size, and an address.
py::tuple merge_chunk_of(std::uintptr_t sources, std::int64_t count, const std::vector<BatchArguments>& arguments,
                         const std::string& instruction_set, int descriptor, std::int64_t offset, bool fetch, bool release,
                         bool refuse_nonfinite, std::mutex* turn) {
  const auto* rows = reinterpret_cast<const std::int64_t(*)[4]>(sources);
  std::vector<Version> versions;
  for (std::int64_t k = 0; k < count; ++k)
    versions.push_back({static_cast<int>(rows[k][0]), rows[k][1], rows[k][2], reinterpret_cast<char*>(rows[k][3])});
  std::vector<std::string> dtypes;  // the batches point to them
  dtypes.reserve(arguments.size());
  std::vector<Family> families;  // and to these
  families.reserve(arguments.size());
  std::vector<Batch> batches;
  for (const auto& [result, codes, task_vectors, scale, required, segments, descriptors, counts, expansions, family] : arguments) {
    batches.push_back(
        batch_of(result, dtypes.emplace_back(codes), task_vectors, scale, required, segments, descriptors, counts));
    batches.back().expansions = reinterpret_cast<const std::int64_t*>(expansions);
    if (family) batches.back().family = &families.emplace_back(family_of(*family));
  }
  ChunkResult done;
  {
    const py::gil_scoped_release released;
    done = merge_chunk(versions, batches, instruction_set, descriptor, offset, {fetch, release, refuse_nonfinite}, turn);
  }
  return py::make_tuple(static_cast<int>(done.outcome), done.error, done.cached,
                        py::make_tuple(done.times[0], done.times[1], done.times[2], done.times[3]));
}

// A type of the kernels, if it is one of those that are allowed.
Dtype dtype_of(int code, std::initializer_list<Dtype> allowed) {
  for (const Dtype dtype : allowed)
    if (dtype == code) return dtype;
  throw std::invalid_argument("no such storage type here");
}

// Deltas. Addresses and codes of types, as native.py and masks.py pass them.
void define_deltas(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> released;
  m.def(
      "apply_cpu",
      [](int result, int means, int arithmetic, int act, double scale, std::int64_t segments, std::uintptr_t descriptors,
         std::uintptr_t counts, int threads, const std::string& instruction_set) {
        const Dtype wide = dtype_of(arithmetic, {kF64, kF32});
        const Dtype stored = wide == kF64 ? dtype_of(result, {kF64, kF32, kF16, kBF16}) : dtype_of(result, {kF32, kF16, kBF16});
        const DeltaBatch batch{stored, dtype_of(means, {wide, kBF16}), wide == kF64, static_cast<Act>(act), scale, segments,
                               reinterpret_cast<const std::int64_t*>(descriptors), reinterpret_cast<std::int64_t*>(counts)};
        apply_cpu(batch, threads, instruction_set);
      },
      released);
  m.def(
      "pack_mask",
      [](std::uintptr_t dense, std::int64_t numel, int arithmetic, int stored, std::uintptr_t mask, std::uintptr_t means,
         const std::string& instruction_set) {
        const PlainArithmetic plain;
        return delta_loop(instruction_set)
            .pack(reinterpret_cast<const char*>(dense), numel, static_cast<Dtype>(arithmetic), static_cast<Dtype>(stored),
                  reinterpret_cast<char*>(mask), reinterpret_cast<char*>(means));
      },
      released);
  m.def(
      "expand_mask",
      [](std::uintptr_t mask, std::int64_t begin, std::int64_t numel, std::uintptr_t means, int stored, int arithmetic,
         std::uintptr_t dense, const std::string& instruction_set) {
        const PlainArithmetic plain;
        delta_loop(instruction_set)
            .expand(reinterpret_cast<const char*>(mask), begin, numel, reinterpret_cast<const char*>(means),
                    static_cast<Dtype>(stored), static_cast<Dtype>(arithmetic), reinterpret_cast<char*>(dense));
      },
      released);
  m.def(
      "rank_mask",
      [](std::uintptr_t mask, std::int64_t begin, std::int64_t end, const std::string& instruction_set) {
        return delta_loop(instruction_set).rank(reinterpret_cast<const char*>(mask), begin, end);
      },
      released);
  m.def(
      "rank_blocks",
      [](std::uintptr_t mask, std::int64_t numel, std::uintptr_t ranks, const std::string& instruction_set) {
        return rank_blocks(delta_loop(instruction_set), reinterpret_cast<const char*>(mask), numel,
                           reinterpret_cast<std::int64_t*>(ranks));
      },
      released);
}

// Low-rank differences, merged and written. Descriptors as descriptors.py packs them.
void define_low_rank(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> released;
  m.def(
      "merge_low_rank_cpu",
      [](int result, const std::string& dtypes, bool task_vectors, double scale, std::int64_t required, std::int64_t segments,
         std::uintptr_t descriptors, std::uintptr_t counts, std::uintptr_t expansions, bool consensus, int threads,
         const std::string& instruction_set) {
        Batch batch = batch_of(result, dtypes, task_vectors, scale, required, segments, descriptors, counts);
        batch.expansions = reinterpret_cast<const std::int64_t*>(expansions);
        if (consensus) batch.consensus = true, batch.scale = -1;
        merge_cpu(batch, threads, instruction_set);
      },
      released);
  m.def(
      "expand_cpu",
      [](int arithmetic, bool adds, int result, std::int64_t segments, std::uintptr_t descriptors, int threads,
         const std::string& instruction_set) {
        const Dtype wide = dtype_of(arithmetic, {kF64, kF32});
        const Dtype stored = wide == kF64 ? dtype_of(result) : dtype_of(result, {kF32, kF16, kBF16});
        expand_cpu({wide == kF64, adds, stored, segments, reinterpret_cast<const std::int64_t*>(descriptors)}, threads,
                   instruction_set);
      },
      released);
}

// Merges by the rule of family.h. expansions: their address, or 0.
void define_family(py::module_& m) {
  m.def(
      "merge_family_cpu",
      [](int result, const std::string& dtypes, bool task_vectors, double scale, std::int64_t required, std::int64_t segments,
         std::uintptr_t descriptors, std::uintptr_t counts, const FamilyArguments& arguments, std::uintptr_t expansions, bool consensus,
         int threads, const std::string& instruction_set) {
        const Family family = family_of(arguments);
        Batch batch = batch_of(result, dtypes, task_vectors, scale, required, segments, descriptors, counts);
        batch.family = &family;
        batch.expansions = reinterpret_cast<const std::int64_t*>(expansions);
        if (consensus) batch.consensus = true, batch.scale = -1;
        merge_cpu(batch, threads, instruction_set);
      },
      py::call_guard<py::gil_scoped_release>());
}

// Magnitudes, as backends/magnitudes.py measures them.
void define_magnitudes(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> released;
  m.def(
      "measure_magnitudes",
      [](int result, const std::string& dtypes, bool task_vectors, std::int64_t segments, std::uintptr_t descriptors,
         std::uintptr_t edges, std::uintptr_t counts, std::uintptr_t found, const std::string& instruction_set) {
        measure_magnitudes(batch_of(result, dtypes, task_vectors, 0, 0, segments, descriptors, 0),
                           {reinterpret_cast<const double*>(edges), reinterpret_cast<std::int64_t*>(counts),
                            reinterpret_cast<void*>(found)},
                           instruction_set);
      },
      released);
  m.def(
      "read_ranges",
      [](std::uintptr_t sources, std::int64_t count) { return read_ranges(reinterpret_cast<const std::int64_t*>(sources), count); },
      released);
}

// consensus: only to means.
template <bool consensus>
void define_merge(py::module_& m, const char* name) {
  m.def(
      name,
      [](int result, const std::string& dtypes, bool task_vectors, double scale, std::int64_t required,
         std::int64_t segments, std::uintptr_t descriptors, std::uintptr_t counts, int threads,
         const std::string& instruction_set) {
        Batch batch = batch_of(result, dtypes, task_vectors, scale, required, segments, descriptors, counts);
        if (consensus) batch.consensus = true, batch.scale = -1;
        merge_cpu(batch, threads, instruction_set);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The compiled kernels; native.py wraps them.";
  m.attr("instruction_sets") = instruction_sets();
  m.def("asked_instruction_set", asked_instruction_set);
  define_merge<false>(m, "merge_cpu");
  define_merge<true>(m, "consensus_cpu");
  m.def(
      "count_prefixes",
      [](int result, const std::string& dtypes, bool task_vectors, std::int64_t segments, std::uintptr_t descriptors,
         std::uintptr_t counts, std::uintptr_t edges, std::int64_t edge_count, const std::string& instruction_set) {
        count_prefixes(batch_of(result, dtypes, task_vectors, 0, 0, segments, descriptors, counts),
                       {reinterpret_cast<const double*>(edges), edge_count}, instruction_set);
      },
      py::call_guard<py::gil_scoped_release>());
  py::class_<std::mutex>(m, "Turn").def(py::init<>());
  m.def("merge_chunk", merge_chunk_of);
  define_deltas(m);
  define_low_rank(m);
  define_family(m);
  define_magnitudes(m);
#ifdef NEGMERGE_WITH_CUDA
  m.attr("cuda") = true;
  m.attr("cuda_tile") = kCudaTile;
  m.attr("cuda_table") = kCudaTable;
  m.def(
      "merge_cuda",
      [](int result, const std::string& dtypes, bool task_vectors, double scale, std::int64_t required,
         std::int64_t segments, std::uintptr_t table, std::int64_t words, std::uintptr_t counts, std::int64_t tiles,
         std::int64_t max_blocks, int device, std::uintptr_t stream) {
        merge_cuda(batch_of(result, dtypes, task_vectors, scale, required, segments, 0, counts),
                   reinterpret_cast<const std::int64_t*>(table), words, tiles, max_blocks, device, stream);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "family_cuda",
      [](int result, const std::string& dtypes, bool task_vectors, double scale, std::int64_t required, std::int64_t segments,
         const FamilyArguments& arguments, std::uintptr_t table, std::int64_t words, std::uintptr_t counts, std::int64_t tiles,
         std::int64_t max_blocks, int device, std::uintptr_t stream) {
        const Family family = family_of(arguments);
        Batch batch = batch_of(result, dtypes, task_vectors, scale, required, segments, 0, counts);
        batch.family = &family;
        family_cuda(batch, reinterpret_cast<const std::int64_t*>(table), words, tiles, max_blocks, device, stream);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "apply_cuda",
      [](int result, int means, int arithmetic, int act, double scale, std::int64_t segments, std::uintptr_t table,
         std::int64_t words, std::uintptr_t counts, std::int64_t tiles, std::int64_t max_blocks, int device,
         std::uintptr_t stream) {
        const DeltaBatch batch{dtype_of(result), dtype_of(means), dtype_of(arithmetic) == kF64, static_cast<Act>(act), scale,
                               segments, nullptr, reinterpret_cast<std::int64_t*>(counts)};
        apply_cuda(batch, reinterpret_cast<const std::int64_t*>(table), words, tiles, max_blocks, device, stream);
      },
      py::call_guard<py::gil_scoped_release>());
  m.attr("expand_tile") = py::make_tuple(kExpandRows, kExpandColumns);
  m.def(
      "expand_cuda",
      [](int result, int arithmetic, std::int64_t boxes, std::uintptr_t table, std::int64_t words, std::uintptr_t /* counts */,
         std::int64_t tiles, std::int64_t max_blocks, int device, std::uintptr_t stream) {
        expand_cuda(dtype_of(result), dtype_of(arithmetic, {kF64, kF32}) == kF64, boxes, reinterpret_cast<const std::int64_t*>(table),
                    words, tiles, max_blocks, device, stream);
      },
      py::call_guard<py::gil_scoped_release>());
#else
  m.attr("cuda") = false;
#endif
}

}  // namespace negmerge
