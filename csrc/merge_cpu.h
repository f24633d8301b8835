// The interface of the CPU kernel.
#pragma once

#include <string>
#include <vector>

#include "merge_loop.h"

namespace negmerge {

// The instruction sets that were compiled in and that this machine has, best first.
std::vector<std::string> instruction_sets();

// The one that the environment asks for by NEGMERGE_CPU, which may be none of these; or the best of them.
std::string asked_instruction_set();

// The loop that merges a batch. Throws std::invalid_argument for an instruction set that is not one of the above.
Loop loop_for(const Batch& batch, const std::string& instruction_set);

// Merges a batch on at most `threads` threads. Throws as loop_for.
void merge_cpu(const Batch& batch, int threads, const std::string& instruction_set);

}  // namespace negmerge
