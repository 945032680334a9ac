#include "machine/refused_calls.h"

#include <mutex>
#include <set>

namespace tkt {
namespace {

std::mutex calls_mutex;
std::set<std::string>& calls() {
  static auto* names = new std::set<std::string>();  // never destroyed: threads may outlive static destructors
  return *names;
}

}  // namespace

void note_refused_call(const char* call) {
  const std::lock_guard<std::mutex> lock(calls_mutex);
  calls().insert(call);
}

std::vector<std::string> refused_calls() {
  const std::lock_guard<std::mutex> lock(calls_mutex);
  return {calls().begin(), calls().end()};
}

}  // namespace tkt
