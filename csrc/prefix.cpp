// The choice of a loop for counts of prefixes.
#include "prefix.h"

#include <algorithm>
#include <stdexcept>

#include "merge_cpu.h"

namespace negmerge {

void prefix_loop_baseline(const Batch&, const Bins&);
#ifdef __x86_64__
void prefix_loop_avx2(const Batch&, const Bins&);
void prefix_loop_avx512(const Batch&, const Bins&);
#endif

void count_prefixes(const Batch& batch, const Bins& bins, const std::string& instruction_set) {
  const auto found = instruction_sets();
  if (std::find(found.begin(), found.end(), instruction_set) == found.end())
    throw std::invalid_argument("no instruction set " + instruction_set + " here");
#ifdef __x86_64__
  if (instruction_set == "avx512") return prefix_loop_avx512(batch, bins);
  if (instruction_set == "avx2") return prefix_loop_avx2(batch, bins);
#endif
  prefix_loop_baseline(batch, bins);
}

}  // namespace negmerge
