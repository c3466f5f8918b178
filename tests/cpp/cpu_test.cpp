#include "engine/cpu.h"

#include <sched.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "check.h"
#include "engine/errors.h"
#include "engine/isa.h"
#include "engine/pool.h"
#include "engine/probe.h"

namespace {

// A folder like /sys/fs/cgroup, gone at the end.
class Mount {
 public:
  Mount() {
    char name[] = "/tmp/potluck-cgroup-XXXXXX";
    path_ = mkdtemp(name);
  }
  ~Mount() { (void)!std::system(("rm -rf " + path_).c_str()); }
  void Write(const std::string& name, const std::string& text) const {
    for (size_t at = name.find('/'); at != std::string::npos; at = name.find('/', at + 1))
      mkdir((path_ + "/" + name.substr(0, at)).c_str(), 0700);
    std::ofstream(path_ + "/" + name) << text;
  }
  const std::string& path() const { return path_; }
  // QuotaCpus of a process whose cgroup file holds `cgroup`.
  double Quota(const std::string& cgroup) const {
    Write("self", cgroup);
    return potluck::QuotaCpus(path_ + "/self", path_);
  }

 private:
  std::string path_;
};

// The environment variable for the length of a scope.
class Forced {
 public:
  explicit Forced(const char* isa) { setenv("POTLUCK_ISA", isa, 1); }
  ~Forced() { unsetenv("POTLUCK_ISA"); }
};

}  // namespace

TEST(a_quota_of_cgroup_v2_counts_with_those_above_it) {
  const Mount mount;
  mount.Write("a/b/cpu.max", "max 100000\n");
  CHECK_EQ(mount.Quota("0::/a/b\n"), 0.0);
  mount.Write("a/cpu.max", "250000 100000\n");
  CHECK_EQ(mount.Quota("0::/a/b\n"), 2.5);
  mount.Write("a/b/cpu.max", "50000 100000\n");
  CHECK_EQ(mount.Quota("0::/a/b\n"), 0.5);
}

TEST(a_container_that_sees_its_own_cgroup_as_the_top_finds_its_quota) {
  const Mount mount;
  mount.Write("cpu.max", "200000 100000\n");
  CHECK_EQ(mount.Quota("0::/\n"), 2.0);
}

TEST(a_quota_of_cgroup_v1_is_found_under_either_name) {
  const Mount mount;
  mount.Write("cpu,cpuacct/docker/x/cpu.cfs_quota_us", "300000\n");
  mount.Write("cpu,cpuacct/docker/x/cpu.cfs_period_us", "100000\n");
  CHECK_EQ(mount.Quota("5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n"), 3.0);
  mount.Write("cpu/docker/x/cpu.cfs_quota_us", "100000\n");
  mount.Write("cpu/docker/x/cpu.cfs_period_us", "100000\n");
  CHECK_EQ(mount.Quota("4:cpu,cpuacct:/docker/x\n"), 1.0);
  CHECK_EQ(mount.Quota("5:cpuset:/docker/x\n"), 0.0);
}

TEST(no_quota_is_no_limit) {
  const Mount mount;
  mount.Write("cpu/cpu.cfs_quota_us", "-1\n");
  mount.Write("cpu/cpu.cfs_period_us", "100000\n");
  CHECK_EQ(mount.Quota("4:cpu:/\n0::/gone\n"), 0.0);
  CHECK_EQ(mount.Quota("nonsense\n\n:::\n"), 0.0);
  CHECK_EQ(potluck::QuotaCpus("/nowhere/self", "/nowhere"), 0.0);
}

TEST(allowed_cpus_follow_the_affinity) {
  cpu_set_t former;
  CHECK_EQ(sched_getaffinity(0, sizeof(former), &former), 0);
  cpu_set_t one;
  CPU_ZERO(&one);
  for (size_t cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &former)) {
      CPU_SET(cpu, &one);
      break;
    }
  CHECK_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
  CHECK_EQ(potluck::AllowedCpus(), size_t{1});
  sched_setaffinity(0, sizeof(former), &former);
  CHECK(potluck::AllowedCpus() <= static_cast<size_t>(CPU_COUNT(&former)));
}

TEST(scalar_is_always_there_and_auto_takes_the_best) {
  CHECK_EQ(potluck::CompiledIsas().front(), std::string("scalar"));
  CHECK_EQ(potluck::AvailableIsas().front(), std::string("scalar"));
  unsetenv("POTLUCK_ISA");
  CHECK_EQ(std::string(potluck::ChooseTable("auto").name), potluck::AvailableIsas().back());
  for (const std::string& isa : potluck::AvailableIsas())
    CHECK_EQ(std::string(potluck::ChooseTable(isa).name), isa);
}

TEST(the_environment_forces_auto_and_nothing_else) {
  const Forced forced("scalar");
  CHECK_EQ(std::string(potluck::ChooseTable("auto").name), std::string("scalar"));
  CHECK_EQ(std::string(potluck::ChooseTable(potluck::AvailableIsas().back()).name),
           potluck::AvailableIsas().back());
}

TEST(an_unknown_isa_is_an_error_that_names_those_that_exist) {
  CHECK_THROWS(potluck::ChooseTable(""), potluck::EngineError);
  const Forced forced("nonsense");
  try {
    potluck::ChooseTable("auto");
    CHECK(false);
  } catch (const potluck::EngineError& error) {
    CHECK(std::string(error.what()).find("POTLUCK_ISA=nonsense") == 0);
    CHECK(std::string(error.what()).find("scalar") != std::string::npos);
    CHECK(error.remedy().find("auto, scalar") != std::string::npos);
  }
}

TEST(the_memory_probe_reads_at_a_believable_rate) {
  potluck::Pool pool(2);
  const double rate = potluck::ReadBandwidth(pool, 8 << 20, 2);
  CHECK(rate > 1e8 && rate < 1e12);
  CHECK_THROWS(potluck::ReadBandwidth(pool, 1 << 20, 1), potluck::UsageError);
  CHECK_THROWS(potluck::ReadBandwidth(pool, 8 << 20, 0), potluck::UsageError);
}

TEST(one_of_each_core_comes_before_its_siblings_and_fast_before_slow) {
  const std::vector<int> cpus = potluck::CpusByPreference("/nonexistent");
  if (cpus.size() < 2) {
    std::printf("left out: one CPU has no order\n");
    return;
  }
  const Mount mount;
  for (const int cpu : cpus) {
    const std::string folder = "cpu" + std::to_string(cpu);
    // The first two share a core; the later a CPU, the faster.
    const bool is_of_first_core = cpu == cpus[0] || cpu == cpus[1];
    const std::string siblings = is_of_first_core
                                     ? std::to_string(cpus[0]) + "," + std::to_string(cpus[1])
                                     : std::to_string(cpu);
    mount.Write(folder + "/topology/thread_siblings_list", siblings + "\n");
    mount.Write(folder + "/cpu_capacity", std::to_string(100 + cpu) + "\n");
  }
  const std::vector<int> order = potluck::CpusByPreference(mount.path());
  CHECK_EQ(order.size(), cpus.size());
  CHECK_EQ(order.back(), cpus[1]);
  for (size_t i = 1; i + 1 < order.size(); ++i) CHECK(order[i - 1] > order[i]);
}

TEST(without_figures_cpus_come_in_the_order_of_their_numbers) {
  const std::vector<int> cpus = potluck::CpusByPreference("/nonexistent");
  CHECK(!cpus.empty());
  for (size_t i = 1; i < cpus.size(); ++i) CHECK(cpus[i - 1] < cpus[i]);
}

TEST(a_thread_keeps_to_cpus_and_goes_back) {
  const std::vector<int> all = potluck::CpusByPreference("/nonexistent");
  const std::vector<int> former = potluck::KeepToCpus({all.back()});
  CHECK(former == all);
  CHECK(potluck::CpusByPreference("/nonexistent") == std::vector<int>{all.back()});
  CHECK(!potluck::KeepToCpus(former).empty());
  CHECK(potluck::CpusByPreference("/nonexistent") == all);
  CHECK(potluck::KeepToCpus({-1}).empty());
  CHECK(potluck::CpusByPreference("/nonexistent") == all);
}

CHECK_MAIN
