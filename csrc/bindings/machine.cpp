#include "bindings/machine.h"

#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/dispatch.h"
#include "machine/cpu_features.h"
#include "machine/refused_calls.h"
#include "machine/thread_pool.h"
#include "machine/topology.h"

namespace py = pybind11;

namespace tkt {
namespace {

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : all_tables()) {
    if (is_supported(*table)) names.emplace_back(table->name);
  }
  return names;
}

void set_thread_count_op(int n) {
  set_thread_count(n);
  const int used = thread_count();
  if (used >= n) return;
  const std::string message = std::to_string(n) + " threads were asked for, " + std::to_string(used) +
                              " are used: this process may run on no more CPUs at a time, and threads beyond that "
                              "would wait for each other";
  if (PyErr_WarnEx(PyExc_UserWarning, message.c_str(), 1) != 0) throw py::error_already_set();
}

py::dict topology_op() {
  const Topology found = topology();
  py::list nodes;
  for (const NumaNode& node : found.nodes) nodes.append(py::make_tuple(node.id, node.cores));
  py::dict result;
  result["nodes"] = nodes;
  result["quota"] = found.quota;
  result["default_threads"] = default_thread_count(found);
  result["most_threads"] = most_threads(found);
  return result;
}

void use_topology_op(const std::optional<std::string>& root, const std::vector<int>& cpus) {
  if (!root) return use_topology(nullptr);
  if (cpus.empty()) throw std::invalid_argument("a machine needs a CPU");
  constexpr int kMostCpus = 1 << 16;  // eight times those of the largest kernels: tables are indexed by them
  for (const int cpu : cpus) {
    if (cpu >= 0 && cpu < kMostCpus) continue;
    throw std::invalid_argument("CPUs are numbered 0 to " + std::to_string(kMostCpus - 1) + ", got " +
                                std::to_string(cpu));
  }
  const Topology other = read_topology(*root, cpus);
  use_topology(&other);
}

std::vector<int> nodes_of_threads_op(int n) {
  const Topology found = topology();
  if (n < 1 || n > most_threads(found)) throw std::invalid_argument("no machine for " + std::to_string(n) + " threads");
  return nodes_of_threads(found, n);
}

}  // namespace

void bind_machine(py::module_& m) {
  m.def("cpu_features", [] { return feature_names(cpu_features()); });
  m.def(
      "hide_cpu_features", [](const std::string& names) { hide_cpu_features(features_named(names)); }, py::arg("names"),
      "for tests; '' ends it");
  m.def("supported_isas", &supported_isas, "names of the kernel tables this CPU can run, best first");
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("select_isa", &select_kernels, py::arg("name"), "for tests; '' chooses automatically");
  m.def("thread_count", &thread_count);
  m.def("set_thread_count", &set_thread_count_op, py::arg("n"));
  m.def("begin_step", &begin_step);
  m.def("end_step", &end_step);
  m.def("refused_calls", &refused_calls);
  m.def("topology", &topology_op,
        "nodes: (number, cores: lists of CPUs) that this process may use; quota of CPUs (0: none); thread counts");
  m.def(
      "use_topology", &use_topology_op, py::arg("root") = py::none(), py::arg("cpus") = std::vector<int>(),
      "for tests: the machine whose sys/ and proc/ lie under root, with this affinity; without arguments the real one");
  m.def("nodes_of_threads", &nodes_of_threads_op, py::arg("n"), "for tests: position in nodes of each of n threads");
}

}  // namespace tkt
