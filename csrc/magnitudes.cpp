// The choice of a loop for magnitudes.
#include "magnitudes.h"

#include <algorithm>
#include <stdexcept>

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

}  // namespace negmerge
