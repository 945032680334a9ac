// One pool of threads for the process: parallel loops with a barrier at their end.
#pragma once

#include <cstdint>
#include <functional>

namespace tkt {

// Threads used by the next parallel_for, the calling one included; at least 1.
int thread_count();

// n >= 1, or std::invalid_argument. Takes effect at once; running loops finish first.
void set_thread_count(int n);

// Calls body(task) for every task in [0, tasks) and returns when all are done. Tasks are handed out from a counter, a few
// neighbours at a time: which thread runs which is not fixed, so no result may depend on it. Callable from several threads at once
// (loops then run one after the other) but not from inside a body. Bodies must not throw.
void parallel_for(int64_t tasks, const std::function<void(int64_t task)>& body);

}  // namespace tkt
