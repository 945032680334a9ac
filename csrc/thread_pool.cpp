#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "memory.h"
#include "topology.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tkt {
namespace {

// About 120 us at 3.3 GHz: longer than what Python does between two operations of a layer (30 to 100 us), so that decoding
// never waits for a sleeping thread to wake (60.0 ms a token of V2-Lite fell to 52.0 with it and chunks, 54.6 with chunks
// alone); shorter than a scheduler's time slice, so that a busy machine loses little to a spinning thread.
constexpr int kSpins = 10000;

// Neighbouring tasks read neighbouring memory, so a thread takes several at once; the last chunk, for which the others
// wait, is then 1/16 of a thread's share at most.
constexpr int64_t kChunksPerThread = 16;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// One loop at a time. `state_` is the number of the loop, doubled, plus 1 while it is open; a thread joins by counting
// itself into `active_` and looking at `state_` again, the caller closes the loop and then waits until `active_` is 0. Both
// orders are sequentially consistent, so one of the two sees the other. A thread that wakes too late finds the loop
// closed and is not waited for: on a busy machine that wait would last a scheduler's time slice.
class ThreadPool {
 public:
  explicit ThreadPool(int threads) {
    try {
      for (int i = 1; i < threads; ++i) threads_.emplace_back([this] { work(); });
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

  void run(int64_t tasks, const std::function<void(int64_t)>& body) {
    tasks_ = tasks;
    chunk_ = std::max<int64_t>(1, tasks / (kChunksPerThread * size()));
    body_ = &body;
    next_.store(0);
    state_.fetch_add(3);  // the next number, open
    if (sleeping_.load() > 0) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
      }  // a thread is past its check or inside its wait, never between
      wake_.notify_all();
    }
    take_tasks();
    state_.fetch_sub(1);
    for (int spin = 0; spin < kSpins; ++spin) {
      if (active_.load() == 0) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return active_.load() == 0; });
  }

 private:
  static bool is_open(uint64_t state) { return (state & 1) != 0; }

  void take_tasks() {
    for (;;) {
      const int64_t first = next_.fetch_add(chunk_);
      if (first >= tasks_) return;
      const int64_t end = std::min(first + chunk_, tasks_);
      for (int64_t task = first; task < end; ++task) (*body_)(task);
    }
  }

  bool has_news(uint64_t seen) const {
    const uint64_t state = state_.load();
    return (is_open(state) && state != seen) || stop_.load();
  }

  void work() {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && !has_news(seen); ++spin) pause();
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
        take_tasks();
      }
      if (active_.fetch_sub(1) == 1) {
        {
          std::lock_guard<std::mutex> lock(mutex_);
        }  // the caller is past its check or inside its wait
        done_.notify_one();
      }
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::atomic<uint64_t> state_{2};
  std::atomic<int> active_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<int64_t> next_{0};
  int64_t tasks_ = 0;
  int64_t chunk_ = 1;
  const std::function<void(int64_t)>* body_ = nullptr;
  std::atomic<bool> stop_{false};
};

std::mutex pool_mutex;
ThreadPool* pool = nullptr;  // started by the first loop that needs it
int pool_threads = 0;        // what it was started with; it may have got fewer
int requested_threads = 0;   // 0: default_thread_count()

int requested_or_default() {
  static const int default_threads = default_thread_count();
  return requested_threads > 0 ? requested_threads : default_threads;
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
  after_fork_parent();
}
[[maybe_unused]] const int fork_handlers = pthread_atfork(before_fork, after_fork_parent, after_fork_child);

}  // namespace

int thread_count() {
  std::lock_guard<std::mutex> lock(pool_mutex);
  return requested_or_default();
}

void set_thread_count(int n) {
  if (n < 1) throw std::invalid_argument("thread count must be at least 1, got " + std::to_string(n));
  std::lock_guard<std::mutex> lock(pool_mutex);
  requested_threads = n;
}

void parallel_for(int64_t tasks, const std::function<void(int64_t)>& body) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (pool == nullptr || pool_threads != requested_or_default()) {
    delete pool;
    pool = nullptr;
    pool_threads = requested_or_default();
    pool = new ThreadPool(pool_threads);
  }
  if (tasks == 1 || pool->size() == 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  pool->run(tasks, body);
}

}  // namespace tkt
