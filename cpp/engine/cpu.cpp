#include "engine/cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <sstream>

#if defined(__linux__)
#include <sched.h>
#else
#include <unistd.h>
#endif

namespace potluck {
namespace {

size_t AffinityCpus() {
#if defined(__linux__)
  // Sized for 8192 CPUs: the kernel refuses a mask that is smaller than its own.
  cpu_set_t sets[8];
  if (sched_getaffinity(0, sizeof(sets), sets) == 0) {
    const int count = CPU_COUNT_S(sizeof(sets), sets);
    if (count > 0) return static_cast<size_t>(count);
  }
  return 1;
#else
  return static_cast<size_t>(std::max(1L, sysconf(_SC_NPROCESSORS_ONLN)));
#endif
}

// quota / period of one cgroup's files; 0: no limit, or no such file.
double QuotaOf(const std::string& folder) {
  std::string quota;
  double period = 0;
  std::ifstream v2(folder + "/cpu.max");
  if (v2 >> quota >> period) {
    if (quota == "max" || period <= 0) return 0;
    return std::strtod(quota.c_str(), nullptr) / period;
  }
  double micros = 0;
  std::ifstream v1_quota(folder + "/cpu.cfs_quota_us");
  std::ifstream v1_period(folder + "/cpu.cfs_period_us");
  if (v1_quota >> micros && v1_period >> period && micros > 0 && period > 0) return micros / period;
  return 0;
}

// The tightest quota on the way from `path` up to the mount itself.
double QuotaUpwards(const std::string& mount, std::string path) {
  double tightest = 0;
  for (;;) {
    const double quota = QuotaOf(mount + path);
    if (quota > 0) tightest = tightest > 0 ? std::min(tightest, quota) : quota;
    if (path.empty()) return tightest;
    path.resize(path.find_last_of('/') == std::string::npos ? 0 : path.find_last_of('/'));
  }
}

// Whether a list such as "cpu,cpuacct" holds "cpu".
bool NamesCpu(const std::string& controllers) {
  std::istringstream names(controllers);
  std::string name;
  while (std::getline(names, name, ','))
    if (name == "cpu") return true;
  return false;
}

}  // namespace

double QuotaCpus(const std::string& cgroup_file, const std::string& mount) {
  std::ifstream file(cgroup_file);
  std::string line;
  double tightest = 0;
  while (std::getline(file, line)) {  // "0::/path" (v2) or "4:cpu,cpuacct:/path" (v1)
    std::istringstream fields(line);
    std::string number;
    std::string controllers;
    std::string path;
    std::getline(fields, number, ':');
    std::getline(fields, controllers, ':');
    std::getline(fields, path);
    if (path == "/") path.clear();
    if (!controllers.empty() && !NamesCpu(controllers)) continue;
    std::string own_mount = mount;
    if (!controllers.empty()) own_mount.append("/").append(controllers);
    for (const std::string& place : {own_mount, mount + "/cpu"}) {
      const double quota = QuotaUpwards(place, path);
      if (quota > 0) tightest = tightest > 0 ? std::min(tightest, quota) : quota;
    }
  }
  return tightest;
}

size_t AllowedCpus() {
  const size_t affinity = AffinityCpus();
  const double quota = QuotaCpus("/proc/self/cgroup", "/sys/fs/cgroup");
  if (quota <= 0) return affinity;
  const double whole = std::ceil(quota);
  return whole < static_cast<double>(affinity) ? static_cast<size_t>(whole) : affinity;
}

}  // namespace potluck
