#include "bindings/gil.h"

#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif

#include <atomic>
#include <chrono>
#include <thread>

#include "machine/thread_pool.h"

namespace py = pybind11;

namespace tkt {
namespace {

std::atomic<bool> is_exiting{false};
std::atomic<int64_t> last_call_ms{0};  // of any thread but the main one

// Only the main thread answers signals, and only the main one leaves the interpreter.
bool is_main_thread() {
#if defined(__linux__)
  thread_local const pid_t id = static_cast<pid_t>(syscall(SYS_gettid));
  return id == getpid();
#else
  return false;
#endif
}

void park_if_exiting() {
  while (is_exiting.load() && !is_main_thread()) pause();
}

void check_signals() {
  if (!is_main_thread()) return;
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// Threads that were computing a moment ago are given the time to come by and go to sleep.
void begin_exit() {
  constexpr int64_t kRecentMs = 1000;
  constexpr auto kTime = std::chrono::milliseconds(100);
  is_exiting.store(true);
  if (restart_poll_clock() - last_call_ms.load() > kRecentMs) return;
  const py::gil_scoped_release release;
  std::this_thread::sleep_for(kTime);
}

}  // namespace

void leave_python() {
  park_if_exiting();
  const int64_t now = restart_poll_clock();
  if (!is_main_thread()) last_call_ms.store(now, std::memory_order_relaxed);
}

void return_to_python() { park_if_exiting(); }

void bind_gil() {
  set_poll_hook(&check_signals);
  py::module_::import("atexit").attr("register")(py::cpp_function(&begin_exit));
}

}  // namespace tkt
