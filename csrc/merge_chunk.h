// A chunk of files in one call: its versions are read or mapped, merged, and the result is written.
#pragma once

#include <string>
#include <vector>

#include "batch.h"
#include "windows.h"

namespace negmerge {

// A version of a chunk: a range of a file, and the memory that it is read to.
struct Version {
  FileRange range;
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

// Merges chunks one at a time, on one thread.
class ChunkMerger {
 public:
  // versions: the base, then the models. Addresses in the batches' descriptors are offsets into the versions
  // here, and are replaced by addresses. The result is made in the base's memory, and written.
  ChunkResult merge(const std::vector<Version>& versions, std::vector<Batch>& batches, const std::string& instruction_set,
                    int descriptor, std::int64_t offset, const ChunkOptions& options);

 private:
  bool read(const std::vector<Version>& versions, const ChunkOptions& options, Windows::Use& use, std::vector<const char*>& addresses,
            bool& cached);
  Windows windows_;
};

}  // namespace negmerge
