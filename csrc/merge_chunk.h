// A chunk of files in one call: its versions are read and merged, and the result is written.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "batch.h"

namespace negmerge {

// A version of a chunk: a range of an open file, and the memory that it is read to.
struct Version {
  int descriptor;
  std::int64_t offset, size;
  char* memory;
};

// What a call is to do besides merging.
struct ChunkOptions {
  bool fetch;             // tell the system beforehand what will be read, for it to fetch all at once
  bool release;           // give the pages of what was read back to the system
  bool refuse_nonfinite;  // write nothing if something is not finite
};

enum ChunkOutcome { kWritten, kNotRead, kNonfinite, kNotWritten };

struct ChunkResult {
  ChunkOutcome outcome;
  int error;              // errno of kNotWritten
  bool cached;            // whether all versions were in the page cache
  double times[4];        // when it began, had read, had merged and had written, in seconds of the monotonic clock
};

// Processes a chunk on this thread. The batches' addresses are in the versions' memory; the result is made in that of the first
// version, the base, and written to a descriptor at an offset. turn: held while merging, if not null, where fewer threads may compute
// than read and write.
ChunkResult merge_chunk(const std::vector<Version>& versions, const std::vector<Batch>& batches, const std::string& instruction_set,
                        int descriptor, std::int64_t offset, const ChunkOptions& options, std::mutex* turn);

// Reads ranges of open files, on this thread. sources: [count, 4], the descriptor of a file, an offset, a size, and an address. Returns
// false if one cannot be read, or its file ends before.
bool read_ranges(const std::int64_t* sources, std::int64_t count);

}  // namespace negmerge
