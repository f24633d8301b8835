#include "merge_chunk.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>

#include "merge_cpu.h"

namespace negmerge {
namespace {

constexpr auto kTmpfs = 0x01021994;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

bool is_in_memory(int descriptor) {
  struct statfs found;
  return !fstatfs(descriptor, &found) && found.f_type == kTmpfs;
}

// Whether a version is in memory already, as its last byte tells. All of it is not asked for so: such a read does not make the
// system read ahead.
bool is_cached(const Version& version) {
#ifdef RWF_NOWAIT
  char byte;
  iovec to{&byte, 1};
  if (!version.size || preadv2(version.descriptor, &to, 1, version.offset + version.size - 1, RWF_NOWAIT) == 1) return true;
  return errno == EOPNOTSUPP && is_in_memory(version.descriptor);  // a tmpfs cannot tell, and need not
#else
  return false;
#endif
}

// Returns false if a version cannot be read, or its file ends before.
bool read(const Version& version) {
  for (std::int64_t done = 0; done < version.size;) {
    const ssize_t got = pread(version.descriptor, version.memory + done, version.size - done, version.offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    done += got;
  }
  return true;
}

void advise(const Version& version, int advice) {
  posix_fadvise(version.descriptor, version.offset, version.size, advice);  // a hint: it may fail
}

// Gives back pages before a version, which all workers have read. The system keeps its large pages that are only in part in such a
// range: each lies in one of these whole, as they overlap.
void release_behind(const Version& version) {
  const std::int64_t end = version.offset - version.size, begin = std::max<std::int64_t>(version.offset - 4 * version.size, 0);
  if (begin < end) posix_fadvise(version.descriptor, begin, end - begin, POSIX_FADV_DONTNEED);  // a hint: it may fail
}

bool read(const std::vector<Version>& versions, const ChunkOptions& options, bool& cached) {
  const auto missing = std::find_if_not(versions.begin(), versions.end(), is_cached);
  cached = missing == versions.end();
  if (options.fetch) std::for_each(missing, versions.end(), [](const Version& each) { advise(each, POSIX_FADV_WILLNEED); });
  for (const Version& version : versions) {
    if (!read(version)) return false;
    if (options.release) release_behind(version);
  }
  return true;
}

bool any_nonfinite(const std::vector<Batch>& batches) {
  for (const Batch& batch : batches)
    for (std::int64_t i = 0; i < batch.segments; ++i)
      if (batch.counts[(batch.family ? kFamilyCounted : kCounted) * i + 1]) return true;
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

ChunkResult merge_chunk(const std::vector<Version>& versions, const std::vector<Batch>& batches, const std::string& instruction_set,
                        int descriptor, std::int64_t offset, const ChunkOptions& options, std::mutex* turn) {
  ChunkResult result{kNotRead, 0, false, {now(), 0, 0, 0}};
  if (!read(versions, options, result.cached)) return result;
  result.times[1] = now();
  {
    const auto held = turn ? std::unique_lock(*turn) : std::unique_lock<std::mutex>();
    for (const Batch& batch : batches) merge_cpu(batch, 1, instruction_set);
  }
  result.times[2] = now();
  result.outcome = kNonfinite;
  if (options.refuse_nonfinite && any_nonfinite(batches)) return result;
  result.error = write(descriptor, versions[0].memory, versions[0].size, offset);
  result.outcome = result.error ? kNotWritten : kWritten;
  result.times[3] = now();
  return result;
}

bool read_ranges(const std::int64_t* sources, std::int64_t count) {
  for (const std::int64_t* source = sources; source < sources + 4 * count; source += 4)
    if (!read(Version{static_cast<int>(source[0]), source[1], source[2], reinterpret_cast<char*>(source[3])})) return false;
  return true;
}

}  // namespace negmerge
