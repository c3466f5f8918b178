// Which kernels this CPU can run, and the choice among them. The only global of the engine: the
// tables.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "engine/kernels/table.h"

namespace potluck {

// Names of the tables compiled in, "scalar" first, and of those that this CPU runs, the best last.
std::vector<std::string> CompiledIsas();
std::vector<std::string> AvailableIsas();

// The table of a name; "auto" obeys the environment variable POTLUCK_ISA, and without one takes the
// best that this CPU runs. EngineError: no such name, or the CPU lacks it; never a silent fallback.
const KernelTable& ChooseTable(std::string_view isa);

}  // namespace potluck
