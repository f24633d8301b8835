// The choice of a loop for magnitudes, and reading of many ranges in one call.
#include "magnitudes.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <tuple>

#include "merge_cpu.h"

namespace negmerge {

void magnitude_loop_baseline(const Batch&, const MagnitudeIntervals&);
#ifdef __x86_64__
void magnitude_loop_avx2(const Batch&, const MagnitudeIntervals&);
void magnitude_loop_avx512(const Batch&, const MagnitudeIntervals&);
#endif

void measure_magnitudes(const Batch& batch, const MagnitudeIntervals& intervals, const std::string& instruction_set) {
  const auto found = instruction_sets();
  if (std::find(found.begin(), found.end(), instruction_set) == found.end())
    throw std::invalid_argument("no instruction set " + instruction_set + " here");
#ifdef __x86_64__
  if (instruction_set == "avx512") return magnitude_loop_avx512(batch, intervals);
  if (instruction_set == "avx2") return magnitude_loop_avx2(batch, intervals);
#endif
  magnitude_loop_baseline(batch, intervals);
}

bool read_ranges(const std::int64_t* sources, std::int64_t count) {
  for (const std::int64_t* source = sources; source < sources + 4 * count; source += 4) {
    const auto [descriptor, offset, size] = std::tuple(static_cast<int>(source[0]), source[1], source[2]);
    char* memory = reinterpret_cast<char*>(source[3]);
    for (std::int64_t done = 0; done < size;) {
      const ssize_t got = pread(descriptor, memory + done, size - done, offset + done);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) return false;
      done += got;
    }
  }
  return true;
}

}  // namespace negmerge
