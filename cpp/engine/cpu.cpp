#include "engine/cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <tuple>

#if defined(__linux__)
#include <sched.h>
#else
#include <unistd.h>
#endif

namespace potluck {
namespace {

#if defined(__linux__)
// Sized for 8192 CPUs: the kernel refuses a mask that is smaller than its own.
constexpr int kMostCpus = 8192;
constexpr size_t kSets = kMostCpus / CPU_SETSIZE;

// The CPUs that the calling thread may run on, by number.
std::vector<int> Affinity() {
  cpu_set_t sets[kSets];
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof(sets), sets) != 0) return cpus;
  for (int cpu = 0; cpu < kMostCpus; ++cpu)
    if (CPU_ISSET_S(static_cast<size_t>(cpu), sizeof(sets), sets)) cpus.push_back(cpu);
  return cpus;
}
#endif

size_t AffinityCpus() {
#if defined(__linux__)
  return std::max<size_t>(1, Affinity().size());
#else
  return static_cast<size_t>(std::max(1L, sysconf(_SC_NPROCESSORS_ONLN)));
#endif
}

// The first number in a file; `otherwise` if there is none.
double NumberIn(const std::string& path, double otherwise) {
  std::ifstream file(path);
  double number = 0;
  return file >> number ? number : otherwise;
}

// What orders CPUs; less is taken first.
struct Preference {
  int sibling;   // its place among those of its core
  double speed;  // negative: in the system's own measure, or its clock
  int cpu;
  bool operator<(const Preference& other) const {
    return std::tie(sibling, speed, cpu) < std::tie(other.sibling, other.speed, other.cpu);
  }
};

// Its place in a list such as "0,64" or "0-1".
int PlaceAmongSiblings(const std::string& path, int cpu) {
  std::ifstream file(path);
  std::string range;
  int place = 0;
  while (std::getline(file, range, ',')) {
    std::istringstream bounds(range);
    int first = 0, last = 0;
    char dash = 0;
    if (!(bounds >> first)) return 0;
    if (!(bounds >> dash >> last)) last = first;
    if (cpu >= first && cpu <= last) return place + cpu - first;
    place += last - first + 1;
  }
  return 0;
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

std::vector<int> CpusByPreference(const std::string& root) {
  std::vector<int> cpus;
#if defined(__linux__)
  std::vector<Preference> preferences;
  for (const int cpu : Affinity()) {
    const std::string folder = root + "/cpu" + std::to_string(cpu);
    const double clock = NumberIn(folder + "/cpufreq/cpuinfo_max_freq", 0);
    preferences.push_back({PlaceAmongSiblings(folder + "/topology/thread_siblings_list", cpu),
                           -NumberIn(folder + "/cpu_capacity", clock), cpu});
  }
  std::sort(preferences.begin(), preferences.end());
  cpus.reserve(preferences.size());
  for (const Preference& p : preferences) cpus.push_back(p.cpu);
#else
  static_cast<void>(root);
#endif
  return cpus;
}

std::vector<int> KeepToCpus(const std::vector<int>& cpus) {
#if defined(__linux__)
  cpu_set_t sets[kSets];
  CPU_ZERO_S(sizeof(sets), sets);
  for (const int cpu : cpus)
    if (cpu >= 0 && cpu < kMostCpus) CPU_SET_S(static_cast<size_t>(cpu), sizeof(sets), sets);
  std::vector<int> former = Affinity();
  if (sched_setaffinity(0, sizeof(sets), sets) != 0) former.clear();
  return former;
#else
  static_cast<void>(cpus);
  return {};
#endif
}

size_t AllowedCpus() {
  const size_t affinity = AffinityCpus();
  const double quota = QuotaCpus("/proc/self/cgroup", "/sys/fs/cgroup");
  if (quota <= 0) return affinity;
  const double whole = std::ceil(quota);
  return whole < static_cast<double>(affinity) ? static_cast<size_t>(whole) : affinity;
}

}  // namespace potluck
