#include "thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "topology.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tkt {
namespace {

// About 20 us at 4 GHz: longer than the gap between two loops of one layer (a few us), shorter than a scheduler tick, so
// an oversubscribed machine loses little to a spinning thread.
constexpr int kSpins = 1000;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

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
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(threads_.size()) + 1; }

  void run(int64_t tasks, const std::function<void(int64_t)>& body) {
    tasks_ = tasks;
    body_ = &body;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    take_tasks();
    for (int spin = 0; spin < kSpins; ++spin) {
      if (busy_.load(std::memory_order_acquire) == 0) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_.load(std::memory_order_acquire) == 0; });
  }

 private:
  void take_tasks() {
    for (;;) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks_) return;
      (*body_)(task);
    }
  }

  void work() {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spin) pause();
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
      }
      seen = generation_.load(std::memory_order_acquire);
      if (stop_) return;
      take_tasks();
      if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);  // the caller may be between its check and its wait
        done_.notify_one();
      }
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> busy_{0};
  std::atomic<int64_t> next_{0};
  int64_t tasks_ = 0;
  const std::function<void(int64_t)>* body_ = nullptr;
  bool stop_ = false;
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
// its own. The lock is held across fork() so that it is never copied in a half-way state.
void before_fork() { pool_mutex.lock(); }
void after_fork_parent() { pool_mutex.unlock(); }
void after_fork_child() {
  pool = nullptr;
  pool_mutex.unlock();
}

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
  static const int registered = pthread_atfork(before_fork, after_fork_parent, after_fork_child);
  (void)registered;
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
