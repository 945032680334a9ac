// The thread pool: each task once, whoever calls, and while its size changes.
#include <atomic>
#include <memory>
#include <thread>

#include "check.h"
#include "machine/thread_pool.h"

namespace {

using tkt::parallel_for;
using tkt::parallel_for_nodes;

// Up to eight threads, also where there are fewer CPUs: they are interrupted wherever they stand.
struct Machine {
  explicit Machine(std::vector<int> cores_of_nodes) {
    tkt::Topology topology;
    topology.quota = 0;
    int cpu = 0;
    for (size_t node = 0; node < cores_of_nodes.size(); ++node) {
      topology.nodes.push_back({static_cast<int>(node), {}});
      for (int core = 0; core < cores_of_nodes[node]; ++core) topology.nodes[node].cores.push_back({cpu++});
    }
    tkt::use_topology(&topology);
  }
  ~Machine() { tkt::use_topology(nullptr); }
};

// Counts how often each task ran. The counts are no atomics: TSan sees two threads that run one task, and results that
// the caller reads without having waited.
void check_each_task_runs_once(int64_t tasks) {
  std::vector<int> runs(static_cast<size_t>(tasks));
  parallel_for(tasks, [&](int64_t task) { ++runs[static_cast<size_t>(task)]; });
  for (int64_t task = 0; task < tasks; ++task) {
    CHECK(runs[static_cast<size_t>(task)] == 1) << "but " << runs[static_cast<size_t>(task)] << " for task " << task;
  }
}

TEST(each_task_runs_once_at_any_number_of_threads) {
  const Machine machine({8});
  for (int threads = 1; threads <= 8; ++threads) {
    tkt::set_thread_count(threads);
    for (const int64_t tasks : {0, 1, 2, 3, 7, 8, 9, 100, 1000}) check_each_task_runs_once(tasks);
  }
}

TEST(several_callers_at_once_each_get_all_their_tasks) {
  const Machine machine({8});
  tkt::set_thread_count(4);
  std::atomic<int> failures{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&failures, caller] {
      try {
        for (int loop = 0; loop < 100; ++loop) check_each_task_runs_once(1 + (caller * 37 + loop * 11) % 200);
      } catch (const tkt::test::Failure&) {
        ++failures;
      }
    });
  }
  for (std::thread& thread : callers) thread.join();
  CHECK(failures.load() == 0);
}

TEST(the_number_of_threads_may_change_while_others_call) {
  const Machine machine({8});
  std::atomic<bool> stop{false};
  std::thread changes([&stop] {
    for (int change = 0; !stop.load(); ++change) tkt::set_thread_count(1 + change % 8);
  });
  std::string failure;
  try {
    for (int loop = 0; loop < 300; ++loop) check_each_task_runs_once(64);
  } catch (const tkt::test::Failure& error) {
    failure = error.what();
  }
  stop.store(true);
  changes.join();
  CHECK(failure.empty()) << failure;
}

TEST(a_thread_count_below_one_is_refused) {
  bool refused = false;
  try {
    tkt::set_thread_count(0);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused);
}

TEST(each_task_of_each_node_runs_once) {
  for (const std::vector<int>& cores : {std::vector<int>{4, 4}, {7, 1}, {1, 2, 5}}) {
    const Machine machine(cores);
    for (int threads = 1; threads <= 8; ++threads) {
      tkt::set_thread_count(threads);
      for (const int64_t most : {0, 1, 5, 100}) {
        std::vector<int64_t> tasks;
        std::vector<std::vector<int>> runs;
        for (size_t node = 0; node < cores.size(); ++node) {
          tasks.push_back(node % 2 == 0 ? most : most / 2);
          runs.emplace_back(static_cast<size_t>(tasks.back()));
        }
        parallel_for_nodes(tasks, [&](int node, int64_t first, int64_t end) {
          for (int64_t task = first; task < end; ++task) ++runs[static_cast<size_t>(node)][static_cast<size_t>(task)];
        });
        for (const std::vector<int>& of_node : runs) {
          for (const int count : of_node) CHECK(count == 1) << "but " << count;
        }
      }
    }
  }
}

}  // namespace
