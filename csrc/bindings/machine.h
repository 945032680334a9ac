// The part of the Python module that is about the machine: CPU features, instruction sets, threads, topology.
#pragma once

#include <pybind11/pybind11.h>

namespace tkt {

void bind_machine(pybind11::module_& m);

}  // namespace tkt
