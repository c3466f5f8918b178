// How many CPUs this process may use.
#pragma once

#include <cstddef>
#include <string>

namespace potluck {

// CPUs that affinity and cgroup quotas leave to this process, rounded up; at least 1.
size_t AllowedCpus();

// CPUs' worth of time that cgroups (v1 or v2; the process's own and those above it) allow; 0: no
// limit. cgroup_file is /proc/self/cgroup or its like, mount the folder of the cgroup file systems.
double QuotaCpus(const std::string& cgroup_file, const std::string& mount);

}  // namespace potluck
