// How native code leaves the GIL and comes back to it.
#pragma once

#include <pybind11/pybind11.h>

namespace tkt {

// Between SaveThread and RestoreThread. Once the interpreter is going away, Python ends a thread that wants the GIL by
// unwinding its stack, and a frame of C++ that lets nothing through (here, or in torch) makes of that std::terminate. A
// thread other than the main one sleeps instead, from the start of exit until the process is gone.
void leave_python();
void return_to_python();

// The GIL is released as long as this lives.
class ReleaseGil {
 public:
  ReleaseGil() : state_(PyEval_SaveThread()) { leave_python(); }
  ~ReleaseGil() {
    return_to_python();
    PyEval_RestoreThread(state_);
  }
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;

 private:
  PyThreadState* state_;
};

// Lets long calls answer signals, and threads end quietly at exit.
void bind_gil();

}  // namespace tkt
