#include "merge_chunk.h"

#include <cerrno>
#include <chrono>
#include <fcntl.h>
#include <unistd.h>

#include "merge_cpu.h"

namespace negmerge {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Reads the rest of a range. Returns false if it cannot be read, or the file ends before.
bool read_rest(const Version& version, std::int64_t done) {
  while (done < version.range.size) {
    const ssize_t got = pread(static_cast<int>(version.range.descriptor), version.memory + done, version.range.size - done,
                              version.range.offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    done += got;
  }
  return true;
}

void advise(const FileRange& range, int advice) {
  posix_fadvise(static_cast<int>(range.descriptor), range.offset, range.size, advice);  // a hint: it may fail
}

// Replaces offsets in a batch's descriptors by addresses.
void relocate(Batch& batch, const std::vector<const char*>& addresses) {
  for (std::int64_t i = 0; i < batch.segments; ++i) {
    std::int64_t* row = const_cast<std::int64_t*>(batch.row(i));
    row[1] += reinterpret_cast<std::int64_t>(addresses[0]);
    row[2] = row[1];
    for (std::int64_t k = 0; k < batch.n; ++k) row[3 + k] += reinterpret_cast<std::int64_t>(addresses[1 + k]);
  }
}

bool any_nonfinite(const std::vector<Batch>& batches) {
  for (const Batch& batch : batches)
    for (std::int64_t i = 0; i < batch.segments; ++i)
      if (batch.counts[kCounted * i + 1]) return true;
  return false;
}

// Returns errno, 0 if all was written.
int write(int descriptor, const char* memory, std::int64_t size, std::int64_t offset) {
  for (std::int64_t done = 0; done < size;) {
    const ssize_t put = pwrite(descriptor, memory + done, size - done, offset + done);
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) return put ? errno : EIO;
    done += put;
  }
  // The final sync has little to do then. A hint: it may fail.
  sync_file_range(descriptor, offset, size, SYNC_FILE_RANGE_WRITE);
  return 0;
}

}  // namespace

bool ChunkMerger::read(const std::vector<Version>& versions, const ChunkOptions& options, Windows::Use& use,
                       std::vector<const char*>& addresses, bool& cached) {
  // The base is read, as the result is made in its memory. If it is cached, the models may be.
  const std::int64_t base_cached = read_cached(versions[0].range, versions[0].memory);
  cached = base_cached == versions[0].range.size;
  const bool may_map = cached && Windows::Use::is_guarded();
  bool asked = false;
  for (std::size_t k = 0; k < versions.size(); ++k) {
    const Version& version = versions[k];
    std::int64_t done = base_cached;
    addresses[k] = version.memory;
    if (k) {
      if (may_map && (addresses[k] = use.map(version.range))) continue;
      addresses[k] = version.memory;
      done = cached ? read_cached(version.range, version.memory) : 0;
      cached = cached && done == version.range.size;
    }
    if (!cached && options.fetch && !asked) {
      for (std::size_t i = k; i < versions.size(); ++i) advise(versions[i].range, POSIX_FADV_WILLNEED);
      asked = true;
    }
    if (!read_rest(version, done)) return false;
    if (options.release) advise(version.range, POSIX_FADV_DONTNEED);
  }
  return true;
}

ChunkResult ChunkMerger::merge(const std::vector<Version>& versions, std::vector<Batch>& batches,
                               const std::string& instruction_set, int descriptor, std::int64_t offset,
                               const ChunkOptions& options) {
  ChunkResult result{kNotRead, 0, false, {now(), 0, 0, 0}};
  std::vector<const char*> addresses(versions.size());
  {
    Windows::Use use(windows_);
    if (!read(versions, options, use, addresses, result.cached)) return result;
    result.times[1] = now();
    for (Batch& batch : batches) {
      relocate(batch, addresses);
      merge_cpu(batch, 1, instruction_set);
    }
  }
  result.times[2] = now();
  if (windows_.failed()) return result;
  result.outcome = kNonfinite;
  if (options.refuse_nonfinite && any_nonfinite(batches)) return result;
  result.error = write(descriptor, versions[0].memory, versions[0].range.size, offset);
  result.outcome = result.error ? kNotWritten : kWritten;
  result.times[3] = now();
  return result;
}

}  // namespace negmerge
