// Low-rank differences on the CPU: how tensors are cut into tiles, the threads that expand them, and merging them tile by tile.
#include "low_rank.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "family.h"
#include "merge_cpu.h"
#include "merge_loop.h"
#include "threads.h"

namespace negmerge {

void expand_loop_baseline(const Expansion&, bool, Dtype, const Rectangle&, const Target&, const Panels&);
#ifdef __x86_64__
void expand_loop_avx2(const Expansion&, bool, Dtype, const Rectangle&, const Target&, const Panels&);
void expand_loop_avx512(const Expansion&, bool, Dtype, const Rectangle&, const Target&, const Panels&);
#endif

namespace {

// Chosen by what has to stay in a cache; bench/tuning/low_rank.py --candidates compares them with others.
#ifndef NEGMERGE_EXPANDED_BYTES
#define NEGMERGE_EXPANDED_BYTES (1 << 19)
#endif
#ifndef NEGMERGE_FACTOR_BYTES
#define NEGMERGE_FACTOR_BYTES (1 << 18)
#endif
#ifndef NEGMERGE_MAX_PANELS
#define NEGMERGE_MAX_PANELS 8
#endif
#ifndef NEGMERGE_BLOCK_PANELS
#define NEGMERGE_BLOCK_PANELS 4
#endif
// A tile's elements in all versions, and the right factors of its columns, which the next tile below needs again: together they stay in
// a second-level cache. Right factors of a block are packed at once: of a few columns, whole pages of memory would be touched for little.
constexpr std::int64_t kExpandedBytes = NEGMERGE_EXPANDED_BYTES, kFactorBytes = NEGMERGE_FACTOR_BYTES;
constexpr std::int64_t kMaxPanels = NEGMERGE_MAX_PANELS, kBlockPanels = NEGMERGE_BLOCK_PANELS;  // of a tile's columns, and of a block's
constexpr std::int64_t kMinRows = 8;
// Threads take whole rows, as far as chunks of so many elements can be.
constexpr std::int64_t kMinExpanded = 1 << 16;
// A product and a sum of so many elements take as long as a byte of a merge.
constexpr std::int64_t kProductsPerByte = 8;

ExpandLoop expand_loop(const std::string& instruction_set) {
#ifdef __x86_64__
  if (instruction_set == "avx512") return expand_loop_avx512;
  if (instruction_set == "avx2") return expand_loop_avx2;
#endif
  return expand_loop_baseline;
}

// Memory of a thread, kept for its next batch.
class Scratch {
 public:
  // Returns nothing if there is no memory.
  static Scratch* of_thread(std::int64_t bytes) {
    static thread_local Scratch scratch;
    if (scratch.size_ < bytes) {
      scratch.size_ = 0;
      scratch.held_.reset();
      scratch.held_.reset(new (std::nothrow) char[bytes + 64]);
      if (!scratch.held_) return nullptr;
      scratch.size_ = bytes;
    }
    return &scratch;
  }
  char* at(std::int64_t offset) const {
    return reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(held_.get()) + 63) / 64 * 64) + offset;
  }

 private:
  std::unique_ptr<char[]> held_;
  std::int64_t size_ = 0;
};

// Runs a job on at most `threads` threads that have so much scratch memory: job(scratch). Throws std::bad_alloc if no thread has it.
template <class Job>
void run_with_scratch(int threads, std::int64_t bytes, std::int64_t scratch_bytes, const Job& job) {
  if (!Scratch::of_thread(scratch_bytes)) throw std::bad_alloc();
  run_on_threads(threads, bytes, [&] {
    if (const Scratch* scratch = Scratch::of_thread(scratch_bytes)) job(*scratch);
  });
}

// The size of panels.
std::int64_t panels_bytes(const Expansion& e, std::int64_t bytes) { return (bytes + kPanel - 1) / kPanel * e.rank * kPanel; }

// The size of a tile: elements, and columns if it has several rows. block: columns of a block, some tiles.
struct TileSize {
  std::int64_t elements, columns, block;

  // size: bytes of an element. ranks: of all models together.
  TileSize(std::int64_t models, std::int64_t ranks, std::int64_t size)
      : elements(std::max(kExpandedBytes / (models * size), kMinRows * kPanel / size) / 64 * 64),
        columns(std::clamp<std::int64_t>(kFactorBytes / (ranks * kPanel), 1, kMaxPanels) * kPanel / size) {
    columns = std::min(columns, elements / kMinRows / (kPanel / size) * (kPanel / size));
    block = std::max<std::int64_t>(1, kBlockPanels * kPanel / size / columns) * columns;
  }
};

// Calls process(tile, block) for elements begin … begin + count of rows of so many columns, in tiles. Those of a block of columns come one
// after another, so that its right factors stay in a cache. A block has rows of one matrix, if matrices are of several tiles.
template <class Process>
void for_tiles(std::int64_t begin, std::int64_t count, const Expansion& e, const TileSize& tile, const Process& process) {
  const auto cut = [&](const Rectangle& all) {
    const std::int64_t width = std::min(all.columns, all.rows == 1 ? tile.elements : tile.columns);
    const std::int64_t rows = tile.elements / width < 4 ? 1 : tile.elements / width / 4 * 4;
    const std::int64_t of_block = std::max(width, tile.block);
    for (std::int64_t m = 0; m < all.columns; m += of_block) {
      const Rectangle block{all.row, all.column + m, all.rows, std::min(of_block, all.columns - m)};
      for (std::int64_t j = 0; j < block.columns; j += width)
        for (std::int64_t i = 0; i < all.rows; i += rows)
          process(Rectangle{all.row + i, block.column + j, std::min(rows, all.rows - i), std::min(width, block.columns - j)}, block);
    }
  };
  const std::int64_t columns = e.columns;
  std::int64_t row = begin / columns;
  if (const std::int64_t column = begin % columns) {
    const std::int64_t head = std::min(count, columns - column);
    cut({row++, column, 1, head});
    count -= head;
  }
  for (std::int64_t rows; (rows = count / columns); row += rows, count -= rows * columns) {
    const std::int64_t in_matrix = e.rows - row % e.rows;
    if (in_matrix < rows && tile.elements < 2 * e.rows * std::min(columns, tile.columns)) rows = in_matrix;
    cut({row, 0, rows, columns});
  }
  if (count) cut({row, 0, 1, count});
}

// Calls process(segment, start, elements) for each segment of a chunk.
template <class SizeOf, class Process>
void for_segments(std::int64_t segment, std::int64_t start, std::int64_t elements, const SizeOf& size_of, const Process& process) {
  for (; elements; ++segment, start = 0) {
    const std::int64_t count = std::min(elements, size_of(segment) - start);
    if (count) process(segment, start, count);
    elements -= count;
  }
}

// Copies rows. A row is consecutive in both, and so may the rows be.
void copy_rows(const char* from, std::int64_t from_stride, char* to, std::int64_t to_stride, std::int64_t rows, std::int64_t size) {
  if (from_stride == size && to_stride == size) size *= rows, rows = 1;
  for (; rows--; from += from_stride, to += to_stride) memcpy(to, from, size);
}

// Right factors of a tile. Those of its whole block are packed when its first tile comes. If the block has a few rows, or those of several
// matrices, each tile packs what it needs to `one`.
Panels panels_of(const Expansion& e, std::int64_t size, const Rectangle& tile, const Rectangle& block, char* one, char* packed) {
  if (are_in_panels(e, size, tile.column)) return {nullptr, false};
  const std::int64_t matrix = block.row / e.rows, before = (tile.column - block.column) * size;
  if (block.rows < 8 || (block.row + block.rows - 1) / e.rows != matrix) return {one, false};
  if (!before && tile.row == block.row) pack_panels(e, size, matrix, block.column, block.columns, packed);
  return {packed + panels_bytes(e, before), true};
}

// Merges a batch's chunks on one thread.
class TileMerger {
 public:
  TileMerger(const Batch& batch, Loop merge, ExpandLoop expand)
      : batch_(batch), merge_(merge), expand_(expand), is_double_(is_double(batch)), arithmetic_(is_double_ ? kF64 : kF32) {
    for (std::int64_t i = 0; i < batch.segments; ++i) {
      for (std::int64_t k = 0; k < batch.n; ++k)
        if (const Expansion* e = expansion_of(batch, i, k)) rank_ = std::max(rank_, e->rank);
      const std::int64_t ranks = ranks_of(i);
      if (ranks) packed_ = std::max(packed_, ranks * tile(ranks).block * kSizes[arithmetic_]);
    }
    stride_ = tile(batch.n).elements * kSizes[arithmetic_];
  }

  // A tile of every version, one of means, a panel of right factors, those of a block, descriptors, and terms.
  std::int64_t scratch_bytes() const { return descriptors() + (3 + batch_.n + 4 + 2 * batch_.n) * 8; }

  // Merges elements of a segment.
  void merge(std::int64_t segment, std::int64_t start, std::int64_t count, const Scratch& scratch) const {
    const std::int64_t ranks = ranks_of(segment);
    if (!ranks) return merge_(batch_, {segment, start}, count, false);
    const Expansion* first = nullptr;
    for (std::int64_t k = 0; !first; ++k) first = expansion_of(batch_, segment, k);
    for_tiles(first->begin + start, count, *first, tile(ranks), [&](const Rectangle& tile, const Rectangle& block) {
      merge_tile(segment, tile, block, tile.row * first->columns + tile.column - first->begin, first->columns, scratch);
    });
  }

 private:
  TileSize tile(std::int64_t ranks) const { return {batch_.n + 1, ranks, kSizes[arithmetic_]}; }

  // Of all low-rank models of a segment.
  std::int64_t ranks_of(std::int64_t segment) const {
    std::int64_t ranks = 0;
    for (std::int64_t k = 0; k < batch_.n; ++k)
      if (const Expansion* e = expansion_of(batch_, segment, k)) ranks += e->rank;
    return ranks;
  }

  std::int64_t panel() const { return (batch_.n + 2) * stride_; }
  std::int64_t packed() const { return panel() + rank_ * kPanel; }
  std::int64_t descriptors() const { return packed() + packed_; }

  // offset: of the tile's first element in the segment. columns: from one row to the next.
  void merge_tile(std::int64_t segment, const Rectangle& tile, const Rectangle& block, std::int64_t offset, std::int64_t columns,
                  const Scratch& scratch) const {
    const std::int64_t* row = batch_.row(segment);
    auto* descriptors = reinterpret_cast<std::int64_t*>(scratch.at(this->descriptors()));
    const auto copied = [&](std::int64_t address, Dtype dtype, std::int64_t slot) {
      char* to = scratch.at(slot * stride_);
      const std::int64_t size = kSizes[dtype];
      copy_rows(reinterpret_cast<const char*>(address) + offset * size, columns * size, to, tile.columns * size, tile.rows,
                tile.columns * size);
      return reinterpret_cast<std::int64_t>(to);
    };
    descriptors[0] = tile.rows * tile.columns;
    descriptors[1] = row[1] ? copied(row[1], batch_.result, batch_.n) : 0;
    const Dtype written = batch_.consensus ? arithmetic_ : batch_.result;
    // Merged in place, but where means are of another type.
    char* out = scratch.at((batch_.n + batch_.consensus) * stride_);
    descriptors[2] = row[2] ? reinterpret_cast<std::int64_t>(out) : 0;
    char* packed = scratch.at(this->packed());
    for (std::int64_t k = 0; k < batch_.n; ++k) {
      if (const Expansion* e = expansion_of(batch_, segment, k)) {
        descriptors[3 + k] = reinterpret_cast<std::int64_t>(scratch.at(k * stride_));
        const auto* base = batch_.task_vectors ? nullptr : reinterpret_cast<const char*>(descriptors[1]);
        expand(*e, offset, columns, tile, block, base, scratch.at(k * stride_), scratch.at(panel()), packed);
        packed += panels_bytes(*e, block.columns * kSizes[arithmetic_]);
      } else {
        descriptors[3 + k] = copied(row[3 + k], batch_.dtypes[k], k);
      }
    }
    std::int64_t counts[kFamilyCounted] = {};
    Batch one = batch_;
    one.segments = 1;
    one.descriptors = descriptors;
    one.counts = counts;
    if (batch_.family) merge_rows(one, descriptors, segment, tile, offset, columns, written);
    else merge_(one, {0, 0}, descriptors[0], true);
    const int counted = batch_.family ? kFamilyCounted : kCounted;
    for (int i = 0; i < counted; ++i)
      if (counts[i]) __atomic_fetch_add(batch_.counts + counted * segment + i, counts[i], __ATOMIC_RELAXED);
    const std::int64_t size = kSizes[written];
    if (row[2])
      copy_rows(out, tile.columns * size, reinterpret_cast<char*>(row[2]) + offset * size, columns * size,
                tile.rows, tile.columns * size);
  }

  // Merges a tile by a rule whose terms are of consecutive elements: its rows one by one, unless they are whole. They follow one another
  // in the tile's own memory.
  void merge_rows(Batch& one, std::int64_t* descriptors, std::int64_t segment, const Rectangle& tile, std::int64_t offset,
                  std::int64_t columns, Dtype written) const {
    std::int64_t* terms = descriptors + 3 + batch_.n;
    const SegmentTerms whole = terms_of(batch_, segment);
    memcpy(terms, whole.row, (4 + 2 * batch_.n) * sizeof *terms);
    Family family = *batch_.family;
    family.terms = terms;
    one.family = &family;
    const std::int64_t rows = tile.columns == columns ? tile.rows : 1, elements = descriptors[0] = rows * tile.columns;
    for (std::int64_t i = 0; i < tile.rows; i += rows, offset += rows * columns) {
      terms[0] = whole.begin() + offset;
      terms[2] = whole.weights() ? whole.weights() + offset * whole.weight_size() : 0;
      merge_(one, {0, 0}, elements, true);
      descriptors[1] += descriptors[1] ? elements * kSizes[batch_.result] : 0;
      descriptors[2] += descriptors[2] ? elements * kSizes[written] : 0;
      for (std::int64_t k = 0; k < batch_.n; ++k) descriptors[3 + k] += elements * kSizes[batch_.dtypes[k]];
    }
  }

  // Expands a tile of a model; its rows are written one after the other.
  void expand(const Expansion& e, std::int64_t offset, std::int64_t columns, const Rectangle& tile, const Rectangle& block,
              const char* base, char* out, char* panel, char* packed) const {
    const std::int64_t base_size = kSizes[batch_.result], size = base ? base_size : kSizes[arithmetic_];
    const std::int64_t first = e.begin + offset;
    if (e.columns == columns && first % columns == tile.column) {
      const std::int64_t own_row = first / columns;
      const Rectangle own{own_row, tile.column, tile.rows, tile.columns};
      const Rectangle own_block{own_row - (tile.row - block.row), block.column, block.rows, block.columns};
      const Panels panels = panels_of(e, kSizes[arithmetic_], own, own_block, panel, packed);
      return expand_(e, is_double_, batch_.result, own, {base, tile.columns * base_size, out, tile.columns * size}, panels);
    }
    // A tensor whose factors are of another shape: its rows are cut where they end.
    for (std::int64_t i = 0; i < tile.rows; ++i, out += tile.columns * size, base += base ? tile.columns * base_size : 0)
      for_tiles(first + i * columns, tile.columns, e, this->tile(e.rank), [&](const Rectangle& own, const Rectangle&) {
        const std::int64_t at = own.row * e.columns + own.column - (first + i * columns);
        expand_(e, is_double_, batch_.result, own,
                {base ? base + at * base_size : nullptr, e.columns * base_size, out + at * size, e.columns * size}, {panel, false});
      });
  }

  const Batch& batch_;
  const Loop merge_;
  const ExpandLoop expand_;
  const bool is_double_;
  const Dtype arithmetic_;
  std::int64_t stride_ = 0, rank_ = 0, packed_ = 0;
};

}  // namespace

void pack_panels(const Expansion& e, std::int64_t size, std::int64_t matrix, std::int64_t column, std::int64_t columns, char* panels) {
  const std::int64_t stride = e.columns * size;
  const char* right = e.right + (matrix * e.rank * e.columns + column) * size;
  for (std::int64_t rest = columns * size; rest > 0; rest -= kPanel, right += kPanel) {
    const std::int64_t copied = std::min(rest, kPanel);
    const char* from = right;
    for (std::int64_t r = 0; r < e.rank; ++r, from += stride, panels += kPanel) {
      memcpy(panels, from, copied);
      if (copied < kPanel) memset(panels + copied, 0, kPanel - copied);
    }
  }
}

void merge_low_rank(const Batch& batch, int threads, const std::string& instruction_set) {
  const TileMerger merger(batch, loop_for(batch, instruction_set), expand_loop(instruction_set));
  threads = std::clamp(threads, 1, kMaxThreads);
  std::int64_t cost = 0;
  for (std::int64_t i = 0; i < batch.segments; ++i)
    for (std::int64_t k = 0; k < batch.n; ++k) {
      const Expansion* e = expansion_of(batch, i, k);
      cost += batch.row(i)[0] * (e ? std::max<std::int64_t>(1, e->rank / kProductsPerByte) : kSizes[batch.dtypes[k]]);
    }
  const auto size_of = [&](std::int64_t i) { return batch.row(i)[0]; };
  Partition partition(batch.segments, threads, size_of, kMinExpanded);
  run_with_scratch(threads, cost, merger.scratch_bytes(), [&](const Scratch& scratch) {
    partition.run([&](std::int64_t segment, std::int64_t start, std::int64_t elements) {
      for_segments(segment, start, elements, size_of, [&](std::int64_t i, std::int64_t from, std::int64_t count) {
        merger.merge(i, from, count, scratch);
      });
    });
  });
}

void expand_cpu(const ExpandBatch& batch, int threads, const std::string& instruction_set) {
  loop_for({}, instruction_set);  // which throws if there is none
  const ExpandLoop expand = expand_loop(instruction_set);
  threads = std::clamp(threads, 1, kMaxThreads);
  const auto row_of = [&](std::int64_t i) { return batch.descriptors + 12 * i; };
  const auto expansion = [&](std::int64_t i) -> const Expansion& { return *reinterpret_cast<const Expansion*>(row_of(i) + 3); };
  const std::int64_t wide = batch.is_double ? 8 : 4, size = batch.adds ? kSizes[batch.result] : wide;
  std::int64_t rank = 0, packed = 0, cost = 0;
  for (std::int64_t i = 0; i < batch.segments; ++i) {
    rank = std::max(rank, expansion(i).rank);
    packed = std::max(packed, expansion(i).rank * TileSize(1, expansion(i).rank, wide).block * wide);
    cost += row_of(i)[0] * std::max(size, expansion(i).rank / kProductsPerByte);
  }
  const auto size_of = [&](std::int64_t i) { return row_of(i)[0]; };
  Partition partition(batch.segments, threads, size_of, kMinExpanded);
  run_with_scratch(threads, cost, rank * kPanel + packed, [&](const Scratch& scratch) {
    partition.run([&](std::int64_t segment, std::int64_t start, std::int64_t elements) {
      for_segments(segment, start, elements, size_of, [&](std::int64_t i, std::int64_t from, std::int64_t count) {
        const Expansion& e = expansion(i);
        const char* base = batch.adds ? reinterpret_cast<const char*>(row_of(i)[1]) : nullptr;
        char* out = reinterpret_cast<char*>(row_of(i)[2]);
        for_tiles(e.begin + from, count, e, TileSize(1, e.rank, wide), [&](const Rectangle& tile, const Rectangle& block) {
          const std::int64_t at = (tile.row * e.columns + tile.column - e.begin) * size;
          expand(e, batch.is_double, batch.result, tile, {base ? base + at : nullptr, e.columns * size, out + at, e.columns * size},
                 panels_of(e, wide, tile, block, scratch.at(0), scratch.at(rank * kPanel)));
        });
      });
    });
  });
}

}  // namespace negmerge
