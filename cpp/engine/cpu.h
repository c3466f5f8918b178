// Which CPUs this process may use.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace potluck {

// CPUs that affinity and cgroup quotas leave to this process, rounded up; at least 1.
size_t AllowedCpus();

// CPUs' worth of time that cgroups (v1 or v2; the process's own and those above it) allow; 0: no
// limit. cgroup_file is /proc/self/cgroup or its like, mount the folder of the cgroup file systems.
double QuotaCpus(const std::string& cgroup_file, const std::string& mount);

// The CPUs that this thread may run on, in the order in which threads should take them: one of each
// core before its siblings, fast cores before slow ones. `root` is the folder of the CPUs' figures,
// without which they are taken in the order of their numbers. Off Linux: empty.
std::vector<int> CpusByPreference(const std::string& root = "/sys/devices/system/cpu");

// Lets this thread run on these CPUs alone; those it could run on before. Empty: the system
// refused, or knows no such thing, and nothing has changed.
std::vector<int> KeepToCpus(const std::vector<int>& cpus);

}  // namespace potluck
