// How many threads this process may usefully run.
#pragma once

#include <string>
#include <vector>

namespace tkt {

// Logical CPUs in the affinity mask, grouped by physical core (SMT siblings together), in ascending order.
std::vector<std::vector<int>> physical_cores(const std::vector<int>& allowed_cpus, const std::string& sysfs_cpu_root);

// CPUs' worth of time the cgroup grants (v2 cpu.max, v1 cfs quota); 0 where unlimited.
double cgroup_cpu_quota(const std::string& cgroup_root);

// Physical cores within affinity and quota, at least 1.
int default_thread_count();

}  // namespace tkt
