#include "topology.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <thread>

namespace tkt {
namespace {

std::vector<int> affinity_cpus() {
  std::vector<int> cpus;
#if defined(__linux__)
  // A fixed cpu_set_t holds 1,024 CPUs; the kernel rejects a smaller set than it uses, so grow until it fits.
  for (int bits = 1024; bits <= 1 << 20; bits *= 2) {
    cpu_set_t* set = CPU_ALLOC(static_cast<size_t>(bits));
    if (set == nullptr) break;
    const size_t bytes = CPU_ALLOC_SIZE(static_cast<size_t>(bits));
    const bool ok = sched_getaffinity(0, bytes, set) == 0;
    for (int cpu = 0; ok && cpu < bits; ++cpu) {
      if (CPU_ISSET_S(static_cast<size_t>(cpu), bytes, set)) cpus.push_back(cpu);
    }
    CPU_FREE(set);
    if (ok) break;
  }
#endif
  if (cpus.empty()) {
    const int count = std::max(1u, std::thread::hardware_concurrency());
    for (int cpu = 0; cpu < count; ++cpu) cpus.push_back(cpu);
  }
  return cpus;
}

std::string read_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

}  // namespace

std::vector<std::vector<int>> physical_cores(const std::vector<int>& allowed_cpus, const std::string& sysfs_cpu_root) {
  std::map<std::string, std::vector<int>> cores;  // keyed by the sibling list: equal for siblings, unique per core
  for (const int cpu : allowed_cpus) {
    std::string siblings = read_line(sysfs_cpu_root + "/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
    if (siblings.empty()) siblings = "cpu" + std::to_string(cpu);
    cores[siblings].push_back(cpu);
  }
  std::vector<std::vector<int>> result;
  for (auto& [siblings, cpus] : cores) result.push_back(cpus);
  std::sort(result.begin(), result.end());
  return result;
}

double cgroup_cpu_quota(const std::string& cgroup_root) {
  double quota_us = 0;
  double period_us = 0;
  std::ifstream v2(cgroup_root + "/cpu.max");
  if (v2 >> quota_us >> period_us) return period_us > 0 ? quota_us / period_us : 0;  // "max 100000" fails to parse
  std::ifstream v1_quota(cgroup_root + "/cpu/cpu.cfs_quota_us");
  std::ifstream v1_period(cgroup_root + "/cpu/cpu.cfs_period_us");
  if (v1_quota >> quota_us && v1_period >> period_us && quota_us > 0 && period_us > 0) return quota_us / period_us;
  return 0;
}

int default_thread_count() {
  const int cores = static_cast<int>(physical_cores(affinity_cpus(), "/sys/devices/system/cpu").size());
  const double quota = cgroup_cpu_quota("/sys/fs/cgroup");
  if (quota <= 0) return std::max(1, cores);
  // Rounded down: a thread more than the quota pays for is throttled, and everyone waits for it at the barrier.
  return std::max(1, std::min(cores, static_cast<int>(std::floor(quota))));
}

}  // namespace tkt
