// One pool of threads for the process: parallel loops with a barrier at their end.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "machine/topology.h"

namespace tkt {

// Threads used by the next parallel loop, the calling one included: what was asked for, but no more than
// most_threads().
int thread_count();

// n >= 1, or std::invalid_argument. Loops that are running keep the threads they have.
void set_thread_count(int n);

// The machine as the pool sees it: read before the first loop, and again in a forked child.
Topology topology();

// For tests: the pool takes the machine to be another one, or with null the real one again.
void use_topology(const Topology* other);

// Calls body(task) for every task in [0, tasks), tasks < 2^32, and returns when all are done. A thread begins with
// neighbouring tasks and then helps others: which thread runs which is not fixed, so no result may depend on it.
// Callable from several threads at once (loops then run one after the other); inside a body it runs on that thread
// alone. What a body throws comes out here, when no thread is in the loop any more; tasks that nobody has begun are
// left out.
void parallel_for(int64_t tasks, const std::function<void(int64_t task)>& body);

// The same for tasks whose data lies on NUMA nodes: calls body(node, first, end) for ranges of tasks that together are
// [0, tasks[node]), with nodes as positions in topology().nodes. Threads first do the tasks of their own node, then
// those left on others. A range is of `most_at_once` tasks at most: between two a caller polls, and others look whether
// the loop has failed.
// 256 products of 32 rows and 64 tokens take 80 ms at 8,192 columns; with one token they read 9 MB, so that to begin
// anew costs no prefetching.
constexpr int64_t kMostAtOnce = 256;
void parallel_for_nodes(const std::vector<int64_t>& tasks,
                        const std::function<void(int node, int64_t first, int64_t end)>& body,
                        int64_t most_at_once = kMostAtOnce);

// Between the two, the threads of the pool wait longer for the next loop before they fall asleep: a GPU computes until
// then, and to wake would cost 50 us, once for each layer of a token. May be nested, and called on any thread.
void begin_step();
void end_step();

// For tests: how many of the pool's threads sleep now.
int sleeping_threads();

// What was submitted. Copies are the same job.
class Job {
 public:
  struct State;
  explicit Job(std::shared_ptr<State> state) : state_(std::move(state)) {}

  bool is_done() const;
  // Returns when it is done; throws what it threw.
  void wait() const;

 private:
  std::shared_ptr<State> state_;
};

// Runs `body`, whose loops use the pool, beside the calling thread: experts, say, while that prepares the next step.
// Jobs run one after the other, on one thread that all share; it sleeps between them.
Job submit(std::function<void()> body);

// Called on each thread before its first task, workers and callers alike: for what a thread must set up before it can
// compute, such as the tile configuration of AMX. Must not throw. Null for none.
void set_start_hook(void (*hook)());

// Called by a thread in the middle of a loop that it waits for, about every 100 ms, beginning 100 ms after
// restart_poll_clock(): what it throws ends the loop. Loops that it runs itself run on that thread alone. Null for
// none.
void set_poll_hook(void (*hook)());
int64_t restart_poll_clock();  // the time in ms

}  // namespace tkt
