// What this machine offers: the CPUs we may use, and the kernels that its CPU can run.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "engine/kernels/table.h"

namespace potluck {

// CPUs that affinity and cgroup quotas leave to this process, rounded up; at least 1.
size_t AllowedCpus();

// CPUs' worth of time that cgroups (v1 or v2; the process's own and those above it) allow; 0: no
// limit. cgroup_file is /proc/self/cgroup or its like, mount the folder of the cgroup file systems.
double QuotaCpus(const std::string& cgroup_file, const std::string& mount);

// Names of the tables compiled in, "scalar" first, and of those that this CPU runs, the best last.
std::vector<std::string> CompiledIsas();
std::vector<std::string> AvailableIsas();

// The table of a name; "auto" obeys the environment variable POTLUCK_ISA, and without one takes the
// best that this CPU runs. EngineError: no such name, or the CPU lacks it; never a silent fallback.
const KernelTable& ChooseTable(std::string_view isa);

}  // namespace potluck
