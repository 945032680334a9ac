#include "machine/topology.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <thread>

namespace tkt {
namespace {

// Of a list in sysfs: far above any machine, and a file is opened for each number of some.
constexpr int kMostListed = 1 << 16;

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// "0-3,8" -> {0, 1, 2, 3, 8}, the form of every list in sysfs.
std::set<int> numbers_in(const std::string& list) {
  std::set<int> numbers;
  std::istringstream ranges(list);
  for (std::string range; std::getline(ranges, range, ',');) {
    std::istringstream ends(range);
    int first = 0;
    if (!(ends >> first)) continue;
    int last = first;
    if (ends.peek() == '-' && !(ends.ignore() >> last)) last = first;
    for (int number = std::max(first, 0); number <= std::min(last, kMostListed); ++number) numbers.insert(number);
  }
  return numbers;
}

std::vector<int> online_among(const std::string& devices, const std::vector<int>& allowed_cpus) {
  const std::set<int> online = numbers_in(first_line(devices + "/cpu/online"));
  std::vector<int> cpus;
  for (const int cpu : allowed_cpus) {
    if (online.count(cpu) > 0) cpus.push_back(cpu);
  }
  return cpus.empty() ? allowed_cpus : cpus;
}

double smaller_quota(double a, double b) {
  if (a <= 0 || b <= 0) return std::max(a, b);
  return std::min(a, b);
}

// "max 100000", like a file that is not there, is no quota.
double quota_v2(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  double quota_us = 0;
  double period_us = 0;
  return file >> quota_us >> period_us && period_us > 0 ? std::max(0.0, quota_us / period_us) : 0;
}

double quota_v1(const std::string& folder) {
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us");
  std::ifstream period_file(folder + "/cpu.cfs_period_us");
  double quota_us = 0;
  double period_us = 0;
  return quota_file >> quota_us && period_file >> period_us && period_us > 0 ? std::max(0.0, quota_us / period_us) : 0;
}

// From the process's own group up to the root of the mount: each of them may limit. In a container the path may be one
// of the host's, of which only the root is seen.
template <typename QuotaOf>
double tightest_quota(const std::string& mount, std::string group, QuotaOf quota_of) {
  double tightest = 0;
  while (!group.empty() && group != "/") {
    tightest = smaller_quota(tightest, quota_of(mount + group));
    group.erase(group.find_last_of('/') == std::string::npos ? 0 : group.find_last_of('/'));
  }
  return smaller_quota(tightest, quota_of(mount));
}

// Lines are "number:controllers:/path"; v2 has number 0 and no controllers.
double cgroup_quota(const std::string& root) {
  const std::string mount = root + "/sys/fs/cgroup";
  std::string path_v1;
  std::string path_v2;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    std::istringstream fields(line);
    std::string number;
    std::string controllers;
    std::string path;
    std::getline(std::getline(std::getline(fields, number, ':'), controllers, ':'), path);
    if (controllers.empty()) path_v2 = path;
    if (("," + controllers + ",").find(",cpu,") != std::string::npos) path_v1 = path;
  }
  return smaller_quota(tightest_quota(mount, path_v2, quota_v2), tightest_quota(mount + "/cpu", path_v1, quota_v1));
}

int core_count(const NumaNode& node) { return static_cast<int>(node.cores.size()); }

int cpu_count(const NumaNode& node) {
  size_t count = 0;
  for (const std::vector<int>& cpus : node.cores) count += cpus.size();
  return static_cast<int>(count);
}

int total_of(const Topology& topology, int (*count)(const NumaNode&)) {
  int total = 0;
  for (const NumaNode& node : topology.nodes) total += count(node);
  return total;
}

}  // namespace

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
    const int count = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    for (int cpu = 0; cpu < count; ++cpu) cpus.push_back(cpu);
  }
  return cpus;
}

Topology read_topology(const std::string& root, const std::vector<int>& allowed_cpus) {
  const std::string devices = root + "/sys/devices/system";
  std::map<int, int> node_of_cpu;
  for (const int node : numbers_in(first_line(devices + "/node/online"))) {
    const std::string list = first_line(devices + "/node/node" + std::to_string(node) + "/cpulist");
    for (const int cpu : numbers_in(list)) node_of_cpu[cpu] = node;
  }
  // Siblings have equal lists. Where there are none each CPU is a core.
  std::map<int, std::map<std::string, std::vector<int>>> cores_of_node;
  for (const int cpu : online_among(devices, allowed_cpus)) {
    const std::string name = "cpu" + std::to_string(cpu);
    const std::string siblings = first_line(devices + "/cpu/" + name + "/topology/thread_siblings_list");
    const auto node = node_of_cpu.find(cpu);
    cores_of_node[node == node_of_cpu.end() ? 0 : node->second][siblings.empty() ? name : siblings].push_back(cpu);
  }
  Topology topology{{}, cgroup_quota(root)};
  for (auto& [id, cores] : cores_of_node) {
    NumaNode node{id, {}};
    for (auto& [siblings, cpus] : cores) {
      std::sort(cpus.begin(), cpus.end());
      node.cores.push_back(cpus);
    }
    std::sort(node.cores.begin(), node.cores.end());
    topology.nodes.push_back(node);
  }
  return topology;
}

int default_thread_count(const Topology& topology) {
  const int cores = total_of(topology, core_count);
  if (topology.quota <= 0) return cores;
  // Rounded down: a thread more than the quota pays for is throttled, and everyone waits for it at the barrier.
  return static_cast<int>(std::max(1.0, std::min<double>(cores, std::floor(topology.quota))));
}

int most_threads(const Topology& topology) {
  const int cpus = total_of(topology, cpu_count);
  if (topology.quota <= 0) return cpus;
  return static_cast<int>(std::max(1.0, std::min<double>(cpus, std::ceil(topology.quota))));
}

std::vector<int> nodes_of_threads(const Topology& topology, int n) {
  const int cores = total_of(topology, core_count);
  std::vector<int> threads(topology.nodes.size(), 0);
  std::vector<int> places;
  while (static_cast<int>(places.size()) < n) {
    const auto room = static_cast<int>(places.size()) < cores ? core_count : cpu_count;
    // Sainte-Lague's method, with no node above what it has.
    size_t best = 0;
    double best_claim = -1;
    for (size_t i = 0; i < threads.size(); ++i) {
      const double claim = room(topology.nodes[i]) / (2.0 * threads[i] + 1);
      if (threads[i] < room(topology.nodes[i]) && claim > best_claim) {
        best = i;
        best_claim = claim;
      }
    }
    ++threads[best];
    places.push_back(static_cast<int>(best));
  }
  return places;
}

}  // namespace tkt
