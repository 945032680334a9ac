// The thread pool: each task once, whoever calls, and while its size changes.
#include <atomic>
#include <chrono>
#include <memory>
#include <new>
#include <stdexcept>
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

// Threads spin for 50 ms then, and for 0.1 ms otherwise; a test that was itself held up looks again.
TEST(threads_stay_awake_while_a_step_is_in_flight_and_sleep_afterwards) {
  using Clock = std::chrono::steady_clock;
  if (std::thread::hardware_concurrency() < 2) return;
  const Machine machine({2});
  tkt::set_thread_count(2);
  bool was_in_time = false;
  for (int attempt = 0; attempt < 100 && !was_in_time; ++attempt) {
    tkt::begin_step();
    const auto begin = Clock::now();
    parallel_for(2, [](int64_t) {});
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    const int sleeping = tkt::sleeping_threads();
    was_in_time = Clock::now() - begin < std::chrono::milliseconds(10);
    tkt::end_step();
    CHECK(!was_in_time || sleeping == 0) << "but " << sleeping << " sleep";
  }
  for (int ms = 0; ms < 10000 && tkt::sleeping_threads() == 0; ++ms) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  CHECK(tkt::sleeping_threads() == 1) << "but " << tkt::sleeping_threads();
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

TEST(what_a_body_throws_comes_out_of_the_loop_and_the_pool_goes_on) {
  const Machine machine({8});
  for (const int threads : {1, 2, 8}) {
    tkt::set_thread_count(threads);
    for (int64_t failing = 0; failing < 100; ++failing) {
      std::vector<int> runs(100);
      bool thrown = false;
      try {
        parallel_for(100, [&](int64_t task) {
          ++runs[static_cast<size_t>(task)];
          if (task >= failing) throw std::bad_alloc();
        });
      } catch (const std::bad_alloc&) {
        thrown = true;
      }
      CHECK(thrown);
      for (const int count : runs) CHECK(count <= 1);
      check_each_task_runs_once(100);
    }
  }
}

TEST(a_loop_inside_a_body_runs_on_that_thread) {
  const Machine machine({8});
  tkt::set_thread_count(4);
  parallel_for(20, [](int64_t) {
    const std::thread::id here = std::this_thread::get_id();
    std::vector<std::thread::id> ids(50);
    parallel_for(50, [&](int64_t task) { ids[static_cast<size_t>(task)] = std::this_thread::get_id(); });
    for (const std::thread::id id : ids) CHECK(id == here);
  });
}

std::atomic<int> starts{0};
thread_local bool has_started = false;

TEST(each_thread_is_set_up_once_and_before_its_first_task) {
  const Machine machine({8});
  tkt::set_thread_count(8);
  starts.store(0);
  tkt::set_start_hook([] {
    has_started = true;
    ++starts;
  });
  std::atomic<int> strangers{0};
  for (int loop = 0; loop < 50; ++loop) {
    parallel_for(1000, [&](int64_t) {
      if (!has_started) ++strangers;
    });
  }
  tkt::set_start_hook(nullptr);
  CHECK(strangers.load() == 0);
  CHECK(starts.load() >= 1 && starts.load() <= 8) << "but " << starts.load();
}

TEST(jobs_run_beside_loops_of_the_thread_that_submitted_them) {
  const Machine machine({8});
  tkt::set_thread_count(4);
  for (int round = 0; round < 50; ++round) {
    std::vector<int> results(3);  // no atomics: wait() must order them
    std::vector<tkt::Job> jobs;
    for (size_t i = 0; i < results.size(); ++i) {
      jobs.push_back(tkt::submit([&results, i] {
        check_each_task_runs_once(100);
        results[i] = 1;
      }));
    }
    check_each_task_runs_once(100);
    for (size_t i = 0; i < jobs.size(); ++i) {
      jobs[i].wait();
      CHECK(jobs[i].is_done());
      CHECK(results[i] == 1);
    }
  }
}

TEST(what_a_job_throws_comes_out_of_its_wait) {
  const tkt::Job failing = tkt::submit([] { throw std::bad_alloc(); });
  const tkt::Job next = tkt::submit([] { check_each_task_runs_once(10); });
  bool thrown = false;
  try {
    failing.wait();
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  CHECK(thrown);
  next.wait();
}

std::atomic<int> polls{0};

TEST(a_poll_may_end_a_loop_of_any_length) {
  const Machine machine({8});
  for (const int threads : {1, 4}) {
    tkt::set_thread_count(threads);
    tkt::restart_poll_clock();
    tkt::set_poll_hook([] {
      if (++polls == 2) throw std::runtime_error("stop");
    });
    polls.store(0);
    bool thrown = false;
    try {
      parallel_for(100000, [](int64_t) { std::this_thread::sleep_for(std::chrono::milliseconds(1)); });
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    tkt::set_poll_hook(nullptr);
    CHECK(thrown);
    check_each_task_runs_once(1000);
  }
}

}  // namespace
