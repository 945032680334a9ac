#include "machine/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "machine/memory.h"
#include "machine/refused_calls.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tkt {
struct Job::State {
  std::function<void()> body;
  pid_t process = getpid();
  std::mutex mutex;
  std::condition_variable changed;
  bool is_done = false;
  std::exception_ptr error;

  void run() {
    std::exception_ptr thrown;
    try {
      body();
    } catch (...) {
      thrown = std::current_exception();
    }
    std::lock_guard<std::mutex> lock(mutex);
    error = std::move(thrown);
    is_done = true;
    changed.notify_all();
  }
};

namespace {

// About 120 us at 3.3 GHz: longer than what Python does between two operations of a layer (30 to 100 us), so that
// decoding never waits for a sleeping thread to wake (60.0 ms a token of V2-Lite fell to 52.0 with it and chunks, 54.6
// with chunks alone); shorter than a scheduler's time slice, so that a busy machine loses little to a spinning thread.
constexpr int kSpins = 10000;

// About 50 ms, while a step is in flight: longer than a GPU takes for all layers between two whose experts lie here,
// and a bound on what a GPU that hangs costs.
constexpr int kSpinsInFlight = 1 << 22;

std::atomic<int> steps_in_flight{0};

// A thread takes this share of what it was given at a time, so that the last chunk, for which the others wait, is
// small.
constexpr int64_t kChunksPerThread = 16;

// A caller looks this often whether it is to stop.
constexpr int64_t kPollMs = 100;

std::atomic<void (*)()> start_hook{nullptr};
std::atomic<void (*)()> poll_hook{nullptr};

struct ThisThread {
  bool is_in_loop = false;  // its own loops then run on it alone
  void (*started)() = nullptr;
  int64_t next_poll_ms = 0;
};
thread_local ThisThread this_thread;

// To some milliseconds, but read in 5 ns: callers ask between tasks, and loops of decoding take 10 us.
int64_t coarse_ms() {
  timespec now;
#if defined(CLOCK_MONOTONIC_COARSE)
  clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
#else
  clock_gettime(CLOCK_MONOTONIC, &now);
#endif
  return int64_t{now.tv_sec} * 1000 + now.tv_nsec / 1000000;
}

void poll() {
  const int64_t now = coarse_ms();
  if (now < this_thread.next_poll_ms) return;
  this_thread.next_poll_ms = now + kPollMs;
  if (void (*hook)() = poll_hook.load()) hook();
}

void start_this_thread() {
  void (*hook)() = start_hook.load(std::memory_order_relaxed);
  if (hook == this_thread.started) return;
  this_thread.started = hook;
  if (hook != nullptr) hook();
}

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// body(queue, first, end): the tasks [first, end) of a queue.
using ChunkBody = std::function<void(int queue, int64_t first, int64_t end)>;

// The same, with polls between every `slice` tasks.
void run_slices(const ChunkBody& body, int64_t slice, int queue, int64_t first, int64_t end) {
  for (; first < end; first += slice) {
    poll();
    body(queue, first, std::min(end, first + slice));
  }
}

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

  void drop() { left.store(0); }

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
  if (sched_setaffinity(0, CPU_ALLOC_SIZE(bits), set) != 0) note_refused_call(OptionalCall::kSchedSetaffinity);
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
      threads_.reserve(static_cast<size_t>(threads));
      for (int i = 1; i < threads; ++i) {
        threads_.emplace_back([this, i, keep_to_nodes] {
          try {
            if (keep_to_nodes) keep_to(nodes_[static_cast<size_t>(node_of_thread_[static_cast<size_t>(i)])]);
          } catch (const std::bad_alloc&) {
            // It only costs speed.
          }
          work(i);
        });
      }
    } catch (const std::exception&) {
      // The system grants no more threads (a container's pids limit, say) or memory: go on with those there are.
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
  int sleeping() const { return sleeping_.load(); }

  // Queues are nodes, or a single one for everybody. The calling thread polls between every `slice` tasks, the others
  // look there whether the loop has failed: what they read for it may come from a slow disk.
  // Throws what a body threw first, when all threads have left the loop.
  void run(const int64_t* tasks, int queues, int64_t slice, const ChunkBody& body) {
    share_out(tasks, queues);
    body_ = &body;
    slice_ = slice;
    has_failed_.store(false, std::memory_order_relaxed);
    state_.fetch_add(3);  // the next number, open
    if (sleeping_.load() > 0) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
      }  // a thread is past its check or inside its wait, never between
      wake_.notify_all();
    }
    take_tasks(0);
    state_.fetch_sub(1);
    wait_for_others();
    if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  // In a child that was forked in the middle of a loop, by what a poll called: there are no others.
  void abandon() { is_abandoned_ = true; }

 private:
  static bool is_open(uint64_t state) { return (state & 1) != 0; }

  void wait_for_others() {
    if (is_abandoned_) throw std::runtime_error("the process was forked in the middle of an operation");
    for (int spin = 0; spin < spins_; ++spin) {
      if (active_.load() == 0) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return active_.load() == 0; });
  }

  // Keeps the first error; what nobody has begun is dropped.
  void fail() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (error_ == nullptr) error_ = std::current_exception();
    has_failed_.store(true, std::memory_order_relaxed);
    for (int i = 0; i < share_count_; ++i) shares_[static_cast<size_t>(i)].drop();
  }

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
    try {
      start_this_thread();
      take_from(thread, thread);
      const int queue = shares_[static_cast<size_t>(thread)].queue;
      for (const bool same_node : {true, false}) {
        for (int i = 1; i < share_count_; ++i) {
          const int other = (thread + i) % share_count_;
          if ((shares_[static_cast<size_t>(other)].queue == queue) == same_node) take_from(other, thread);
        }
      }
    } catch (...) {
      fail();
    }
  }

  void take_from(int share, int thread) {
    int64_t first;
    int64_t end;
    Share& from = shares_[static_cast<size_t>(share)];
    while (from.take(share == thread, &first, &end)) {
      if (thread == 0) {
        run_slices(*body_, slice_, from.queue, first, end);
        continue;
      }
      for (; first < end && !has_failed_.load(std::memory_order_relaxed); first += slice_) {
        (*body_)(from.queue, first, std::min(end, first + slice_));
      }
    }
  }

  int spins_while_idle() const {
    return spins_ > 0 && steps_in_flight.load(std::memory_order_relaxed) > 0 ? kSpinsInFlight : spins_;
  }

  bool has_news(uint64_t seen) const {
    const uint64_t state = state_.load();
    return (is_open(state) && state != seen) || stop_.load();
  }

  void work(int thread) {
    this_thread.is_in_loop = true;  // whatever it does
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < spins_while_idle() && !has_news(seen); ++spin) pause();
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
  int64_t slice_ = 1;
  std::exception_ptr error_;
  std::atomic<bool> has_failed_{false};
  bool is_abandoned_ = false;
  std::atomic<bool> stop_{false};
};

// Held for moments only: asking for the number of threads never waits for a loop.
std::mutex settings_mutex;
int requested_threads = 0;  // 0: default_thread_count()
bool machine_is_real = true;
std::atomic<uint64_t> settings_version{1};

// Known once somebody asked. Never destroyed: threads may outlive static destructors.
std::optional<Topology>& machine() {
  static auto* known = new std::optional<Topology>();
  return *known;
}

const Topology& known_machine() {
  if (!machine()) machine() = read_topology("", affinity_cpus());
  return *machine();
}

int threads_to_use() {
  if (requested_threads == 0) return default_thread_count(known_machine());
  return std::min(requested_threads, most_threads(known_machine()));
}

// Loops of several callers run one after the other.
struct Loops {
  std::mutex mutex;            // held for a loop
  ThreadPool* pool = nullptr;  // started by the first loop that needs it
  uint64_t version = 0;        // of the settings that it was started with

  ThreadPool& current_pool() {
    if (version != settings_version.load()) {
      delete std::exchange(pool, nullptr);
      std::lock_guard<std::mutex> lock(settings_mutex);
      pool = new ThreadPool(known_machine(), threads_to_use());
      version = settings_version.load();
    }
    return *pool;
  }
};
Loops* loops = new Loops();  // never destroyed, as above

// Threads that settings have made superfluous end at once, or where a loop is running before the next one.
void stop_idle_pool() {
  if (this_thread.is_in_loop || !loops->mutex.try_lock()) return;
  const std::lock_guard<std::mutex> lock(loops->mutex, std::adopt_lock);
  if (loops->version == settings_version.load()) return;
  delete std::exchange(loops->pool, nullptr);
}

void run_loop(const int64_t* tasks, int queues, int64_t slice, const ChunkBody& body) {
  const int64_t total = std::accumulate(tasks, tasks + queues, int64_t{0});
  const auto run_alone = [&] {
    start_this_thread();
    for (int queue = 0; queue < queues; ++queue) run_slices(body, slice, queue, 0, tasks[queue]);
  };
  if (total <= 1 || this_thread.is_in_loop) return run_alone();
  Loops& all = *loops;
  std::lock_guard<std::mutex> lock(all.mutex);
  ThreadPool& pool = all.current_pool();
  struct Leads {
    Leads() { this_thread.is_in_loop = true; }
    ~Leads() { this_thread.is_in_loop = false; }
  } const leads;
  if (pool.size() == 1) return run_alone();
  pool.run(tasks, queues, slice, body);
}

// Jobs, one after the other, on a thread of their own.
class JobThread {
 public:
  void submit(std::shared_ptr<Job::State> job) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!is_running_) {
      std::thread([this] { work(); }).detach();
      is_running_ = true;
    }
    jobs_.push_back(std::move(job));
    wake_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return !jobs_.empty(); });
      const std::shared_ptr<Job::State> job = std::move(jobs_.front());
      jobs_.pop_front();
      lock.unlock();
      job->run();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Job::State>> jobs_;
  bool is_running_ = false;
};
JobThread* job_thread = new JobThread();  // never destroyed, as above

// A forked child has the memory of the pool but none of its threads, and a thread it does not have may hold the lock of
// a loop: it leaks all of that (joining would hang) and starts its own. What is locked for moments is held across
// fork(), so that none is copied in a half-way state.
void before_fork() {
  settings_mutex.lock();
  lock_free_buffers();
}
void after_fork_parent() {
  unlock_free_buffers();
  settings_mutex.unlock();
}
void after_fork_child() {
  if (this_thread.is_in_loop && loops->pool != nullptr) loops->pool->abandon();
  loops = new Loops();
  job_thread = new JobThread();
  if (machine_is_real) machine().reset();  // a worker process is often given CPUs of its own
  after_fork_parent();
}
[[maybe_unused]] const int fork_handlers = pthread_atfork(before_fork, after_fork_parent, after_fork_child);

}  // namespace

int64_t restart_poll_clock() {
  const int64_t now = coarse_ms();
  this_thread.next_poll_ms = now + kPollMs;
  return now;
}

void set_poll_hook(void (*hook)()) { poll_hook.store(hook); }

void set_start_hook(void (*hook)()) { start_hook.store(hook); }

int thread_count() {
  std::lock_guard<std::mutex> lock(settings_mutex);
  return threads_to_use();
}

void set_thread_count(int n) {
  if (n < 1) throw std::invalid_argument("thread count must be at least 1, got " + std::to_string(n));
  {
    std::lock_guard<std::mutex> lock(settings_mutex);
    const int before = threads_to_use();
    requested_threads = n;
    if (threads_to_use() != before) settings_version.fetch_add(1);
  }
  stop_idle_pool();
}

Topology topology() {
  std::lock_guard<std::mutex> lock(settings_mutex);
  return known_machine();
}

void use_topology(const Topology* other) {
  {
    std::lock_guard<std::mutex> lock(settings_mutex);
    machine_is_real = other == nullptr;
    machine() = other == nullptr ? std::nullopt : std::optional<Topology>(*other);
    settings_version.fetch_add(1);
  }
  stop_idle_pool();
}

void parallel_for(int64_t tasks, const std::function<void(int64_t)>& body) {
  run_loop(&tasks, 1, 1, [&body](int, int64_t first, int64_t end) {
    for (int64_t task = first; task < end; ++task) body(task);
  });
}

void parallel_for_nodes(const std::vector<int64_t>& tasks, const ChunkBody& body, int64_t most_at_once) {
  run_loop(tasks.data(), static_cast<int>(tasks.size()), most_at_once, body);
}

bool Job::is_done() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->is_done;
}

void Job::wait() const {
  std::unique_lock<std::mutex> lock(state_->mutex);
  while (!state_->changed.wait_for(lock, std::chrono::milliseconds(kPollMs), [this] { return state_->is_done; })) {
    if (getpid() != state_->process) throw std::runtime_error("the job was submitted before the process was forked");
    lock.unlock();
    poll();
    lock.lock();
  }
  if (state_->error != nullptr) std::rethrow_exception(state_->error);
}

void begin_step() { steps_in_flight.fetch_add(1); }

void end_step() { steps_in_flight.fetch_sub(1); }

int sleeping_threads() {
  const std::lock_guard<std::mutex> lock(loops->mutex);
  return loops->pool == nullptr ? 0 : loops->pool->sleeping();
}

Job submit(std::function<void()> body) {
  auto state = std::make_shared<Job::State>();
  state->body = std::move(body);
  job_thread->submit(state);
  return Job(std::move(state));
}

}  // namespace tkt
