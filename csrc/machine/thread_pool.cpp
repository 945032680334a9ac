#include "machine/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "machine/memory.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tkt {
namespace {

// About 120 us at 3.3 GHz: longer than what Python does between two operations of a layer (30 to 100 us), so that
// decoding never waits for a sleeping thread to wake (60.0 ms a token of V2-Lite fell to 52.0 with it and chunks, 54.6
// with chunks alone); shorter than a scheduler's time slice, so that a busy machine loses little to a spinning thread.
constexpr int kSpins = 10000;

// A thread takes this share of what it was given at a time, so that the last chunk, for which the others wait, is
// small.
constexpr int64_t kChunksPerThread = 16;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// body(queue, first, end): the tasks [first, end) of a queue.
using ChunkBody = std::function<void(int queue, int64_t first, int64_t end)>;

// Neighbouring tasks that one thread begins with: it takes them from the front, threads that have nothing left take
// from the back. So a thread reads on where it stopped, where the hardware's prefetchers and ours have been already.
// With chunks from one counter every chunk was a new beginning: a token of V2-Lite took 6% longer on two threads.
struct alignas(64) Share {
  std::atomic<uint64_t> left{0};  // first task and, in the upper half, the end
  int64_t chunk = 1;
  int queue = 0;

  void give(int q, int64_t first, int64_t end) {
    queue = q;
    chunk = std::max<int64_t>(1, (end - first) / kChunksPerThread);
    left.store(pack(first, end));
  }

  // False when nothing is left.
  bool take(bool from_front, int64_t* first, int64_t* end) {
    uint64_t seen = left.load();
    for (;;) {
      const int64_t begin = static_cast<uint32_t>(seen);
      const int64_t past = static_cast<int64_t>(seen >> 32);
      if (begin == past) return false;
      const int64_t count = std::min(chunk, past - begin);
      *first = from_front ? begin : past - count;
      *end = *first + count;
      const uint64_t rest = from_front ? pack(*end, past) : pack(begin, *first);
      if (left.compare_exchange_weak(seen, rest)) return true;
    }
  }

 private:
  static uint64_t pack(int64_t first, int64_t end) {
    return static_cast<uint64_t>(end) << 32 | static_cast<uint64_t>(first);
  }
};

// Leaves the calling thread to the CPUs of `node` that it may use anyway: never outside its affinity mask, and not to
// one CPU, which might be where somebody else's thread is at work.
void keep_to(const NumaNode& node) {
#if defined(__linux__)
  std::vector<int> cpus;
  for (const int cpu : affinity_cpus()) {
    for (const std::vector<int>& core : node.cores) {
      if (std::find(core.begin(), core.end(), cpu) != core.end()) cpus.push_back(cpu);
    }
  }
  if (cpus.empty()) return;
  const size_t bits = static_cast<size_t>(cpus.back()) + 1;
  cpu_set_t* set = CPU_ALLOC(bits);
  if (set == nullptr) return;
  CPU_ZERO_S(CPU_ALLOC_SIZE(bits), set);
  for (const int cpu : cpus) CPU_SET_S(static_cast<size_t>(cpu), CPU_ALLOC_SIZE(bits), set);
  sched_setaffinity(0, CPU_ALLOC_SIZE(bits), set);  // a refusal only costs speed
  CPU_FREE(set);
#endif
}

// One loop at a time. `state_` is the number of the loop, doubled, plus 1 while it is open; a thread joins by counting
// itself into `active_` and looking at `state_` again, the caller closes the loop and then waits until `active_` is 0.
// Both orders are sequentially consistent, so one of the two sees the other. A thread that wakes too late finds the
// loop closed and is not waited for: on a busy machine that wait would last a scheduler's time slice.
class ThreadPool {
 public:
  ThreadPool(const Topology& topology, int threads)
      : nodes_(topology.nodes), node_of_thread_(nodes_of_threads(topology, threads)) {
    // A spinning thread would hold the CPU that another one needs. There are CPUs for all, unless the machine is a
    // test's, or the starting thread may use fewer CPUs than the process had.
    const bool enough_cpus = threads <= static_cast<int>(affinity_cpus().size());
    spins_ = enough_cpus ? kSpins : 0;
    const bool keep_to_nodes = enough_cpus && nodes_.size() > 1;
    for (size_t node = 0; node < nodes_.size(); ++node) {
      for (const std::vector<int>& core : nodes_[node].cores) {
        node_of_cpu_.resize(std::max(node_of_cpu_.size(), static_cast<size_t>(core.back()) + 1), 0);
        for (const int cpu : core) node_of_cpu_[static_cast<size_t>(cpu)] = static_cast<int>(node);
      }
    }
    try {
      for (int i = 1; i < threads; ++i) {
        threads_.emplace_back([this, i, keep_to_nodes] {
          if (keep_to_nodes) keep_to(nodes_[static_cast<size_t>(node_of_thread_[static_cast<size_t>(i)])]);
          work(i);
        });
      }
    } catch (const std::system_error&) {
      // The system grants no more threads (a container's pids limit, say): go on with those there are.
    }
  }

  ~ThreadPool() {
    stop_.store(true);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      state_.fetch_add(2);
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(threads_.size()) + 1; }

  // Queues are nodes, or a single one for everybody.
  void run(const int64_t* tasks, int queues, const ChunkBody& body) {
    share_out(tasks, queues);
    body_ = &body;
    state_.fetch_add(3);  // the next number, open
    if (sleeping_.load() > 0) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
      }  // a thread is past its check or inside its wait, never between
      wake_.notify_all();
    }
    take_tasks(0);
    state_.fetch_sub(1);
    for (int spin = 0; spin < spins_; ++spin) {
      if (active_.load() == 0) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return active_.load() == 0; });
  }

 private:
  static bool is_open(uint64_t state) { return (state & 1) != 0; }

  int node_of_caller() const {
#if defined(__linux__)
    const size_t here = static_cast<size_t>(std::max(0, sched_getcpu()));
    if (here < node_of_cpu_.size()) return node_of_cpu_[here];
#endif
    return 0;
  }

  // Share i is that of thread i; after them come those of nodes without threads.
  void share_out(const int64_t* tasks, int queues) {
    const int threads = size();
    share_count_ = threads;
    if (queues > 1) node_of_thread_[0] = node_of_caller();
    if (shares_.size() < static_cast<size_t>(threads + queues)) {
      shares_ = std::vector<Share>(static_cast<size_t>(threads + queues));
    }
    for (int q = 0; q < queues; ++q) {
      std::vector<int> owners;
      for (int i = 0; i < threads; ++i) {
        if (queues == 1 || node_of_thread_[static_cast<size_t>(i)] == q) owners.push_back(i);
      }
      if (owners.empty()) owners.push_back(share_count_++);
      const int64_t parts = static_cast<int64_t>(owners.size());
      for (int64_t part = 0; part < parts; ++part) {
        shares_[static_cast<size_t>(owners[static_cast<size_t>(part)])].give(q, tasks[q] * part / parts,
                                                                             tasks[q] * (part + 1) / parts);
      }
    }
  }

  void take_tasks(int thread) {
    take_from(thread, true);
    const int queue = shares_[static_cast<size_t>(thread)].queue;
    for (const bool same_node : {true, false}) {
      for (int i = 1; i < share_count_; ++i) {
        const int other = (thread + i) % share_count_;
        if ((shares_[static_cast<size_t>(other)].queue == queue) == same_node) take_from(other, false);
      }
    }
  }

  void take_from(int share, bool own) {
    int64_t first;
    int64_t end;
    Share& from = shares_[static_cast<size_t>(share)];
    while (from.take(own, &first, &end)) (*body_)(from.queue, first, end);
  }

  bool has_news(uint64_t seen) const {
    const uint64_t state = state_.load();
    return (is_open(state) && state != seen) || stop_.load();
  }

  void work(int thread) {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < spins_ && !has_news(seen); ++spin) pause();
      if (!has_news(seen)) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return has_news(seen); });
        sleeping_.fetch_sub(1);
      }
      if (stop_.load()) return;
      active_.fetch_add(1);
      const uint64_t state = state_.load();
      if (is_open(state) && state != seen) {
        seen = state;
        take_tasks(thread);
      }
      if (active_.fetch_sub(1) == 1) {
        {
          std::lock_guard<std::mutex> lock(mutex_);
        }  // the caller is past its check or inside its wait
        done_.notify_one();
      }
    }
  }

  const std::vector<NumaNode> nodes_;
  std::vector<int> node_of_cpu_;
  std::vector<int> node_of_thread_;  // the first is the caller, which stays where its owner lets it run
  int spins_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::atomic<uint64_t> state_{2};
  std::atomic<int> active_{0};
  std::atomic<int> sleeping_{0};
  std::vector<Share> shares_;
  int share_count_ = 0;
  const ChunkBody* body_ = nullptr;
  std::atomic<bool> stop_{false};
};

std::mutex pool_mutex;            // for all that follows
ThreadPool* pool = nullptr;       // started by the first loop that needs it
int pool_threads = 0;             // what it was started with; it may have got fewer
int requested_threads = 0;        // 0: default_thread_count()
std::optional<Topology> machine;  // known once somebody asked
bool machine_is_real = true;

const Topology& known_machine() {
  if (!machine) machine = read_topology("", affinity_cpus());
  return *machine;
}

int threads_to_use() {
  if (requested_threads == 0) return default_thread_count(known_machine());
  return std::min(requested_threads, most_threads(known_machine()));
}

void stop_pool() {
  delete pool;
  pool = nullptr;
}

// The pool, or null where the caller alone is enough.
ThreadPool* pool_for(int64_t tasks) {
  if (pool == nullptr) {
    pool_threads = threads_to_use();
    pool = new ThreadPool(known_machine(), pool_threads);
  }
  return tasks <= 1 || pool->size() == 1 ? nullptr : pool;
}

// A forked child has the pool's memory but none of its threads: it leaks the object (joining would hang) and starts
// its own. Both locks are held across fork() so that none is copied in a half-way state, in the order in which a loop
// takes them.
void before_fork() {
  pool_mutex.lock();
  lock_free_buffers();
}
void after_fork_parent() {
  unlock_free_buffers();
  pool_mutex.unlock();
}
void after_fork_child() {
  pool = nullptr;
  if (machine_is_real) machine.reset();  // a worker process is often given CPUs of its own
  after_fork_parent();
}
[[maybe_unused]] const int fork_handlers = pthread_atfork(before_fork, after_fork_parent, after_fork_child);

}  // namespace

int thread_count() {
  std::lock_guard<std::mutex> lock(pool_mutex);
  return threads_to_use();
}

void set_thread_count(int n) {
  if (n < 1) throw std::invalid_argument("thread count must be at least 1, got " + std::to_string(n));
  std::lock_guard<std::mutex> lock(pool_mutex);
  requested_threads = n;
  if (pool_threads != threads_to_use()) stop_pool();
}

Topology topology() {
  std::lock_guard<std::mutex> lock(pool_mutex);
  return known_machine();
}

void use_topology(const Topology* other) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  stop_pool();
  machine_is_real = other == nullptr;
  machine = other == nullptr ? std::nullopt : std::optional<Topology>(*other);
}

void parallel_for(int64_t tasks, const std::function<void(int64_t)>& body) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  const auto run_chunk = [&body](int, int64_t first, int64_t end) {
    for (int64_t task = first; task < end; ++task) body(task);
  };
  if (ThreadPool* threads = pool_for(tasks)) {
    threads->run(&tasks, 1, run_chunk);
  } else {
    run_chunk(0, 0, tasks);
  }
}

void parallel_for_nodes(const std::vector<int64_t>& tasks, const ChunkBody& body) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  const int nodes = static_cast<int>(tasks.size());
  if (ThreadPool* threads = pool_for(std::accumulate(tasks.begin(), tasks.end(), int64_t{0}))) {
    threads->run(tasks.data(), nodes, body);
  } else {
    for (int node = 0; node < nodes; ++node) {
      if (tasks[static_cast<size_t>(node)] > 0) body(node, 0, tasks[static_cast<size_t>(node)]);
    }
  }
}

}  // namespace tkt
