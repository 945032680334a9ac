// Where threads may run: NUMA nodes, physical cores, and how much time the process is granted on them.
#pragma once

#include <string>
#include <vector>

namespace tkt {

struct NumaNode {
  int id;                               // the system's number
  std::vector<std::vector<int>> cores;  // the logical CPUs of each physical core (SMT siblings), ascending; never empty
};

struct Topology {
  std::vector<NumaNode> nodes;  // ascending; those where the process may run, so at least one
  double quota;                 // CPUs' worth of time that the cgroups grant; 0 where unlimited
};

// Logical CPUs in the affinity mask of the calling thread (a cpuset is part of it), ascending; at least one.
std::vector<int> affinity_cpus();

// What sys/devices/system, proc/self/cgroup and sys/fs/cgroup under `root` ("" is the machine itself) say about
// `allowed_cpus`. Whatever is missing there counts as simple: one node, one CPU per core, no quota.
Topology read_topology(const std::string& root, const std::vector<int>& allowed_cpus);

// Physical cores within affinity and quota, at least 1.
int default_thread_count(const Topology& topology);

// Logical CPUs within affinity and quota, at least 1. More threads would only wait for each other: a loop ends when its
// last thread ends, and that one may wait a time slice for a CPU (64 threads on 2 CPUs took 28 times as long as 2).
int most_threads(const Topology& topology);

// The position in `nodes` of each of n threads, 1 <= n <= logical CPUs: in proportion to the nodes' cores, and siblings
// only when every core has its thread. One more thread moves none of the others.
std::vector<int> nodes_of_threads(const Topology& topology, int n);

}  // namespace tkt
