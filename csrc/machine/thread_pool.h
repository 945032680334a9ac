// One pool of threads for the process: parallel loops with a barrier at their end.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "machine/topology.h"

namespace tkt {

// Threads used by the next parallel loop, the calling one included: what was asked for, but no more than
// most_threads().
int thread_count();

// n >= 1, or std::invalid_argument. Takes effect at once; running loops finish first.
void set_thread_count(int n);

// The machine as the pool sees it: read before the first loop, and again in a forked child.
Topology topology();

// For tests: the pool takes the machine to be another one, or with null the real one again.
void use_topology(const Topology* other);

// Calls body(task) for every task in [0, tasks), tasks < 2^32, and returns when all are done. A thread begins with
// neighbouring tasks and then helps others: which thread runs which is not fixed, so no result may depend on it.
// Callable from several threads at once (loops then run one after the other) but not from inside a body. Bodies must
// not throw.
void parallel_for(int64_t tasks, const std::function<void(int64_t task)>& body);

// The same for tasks whose data lies on NUMA nodes: calls body(node, first, end) for ranges of tasks that together are
// [0, tasks[node]), with nodes as positions in topology().nodes. Threads first do the tasks of their own node, then
// those left on others.
void parallel_for_nodes(const std::vector<int64_t>& tasks,
                        const std::function<void(int node, int64_t first, int64_t end)>& body);

}  // namespace tkt
