#include "machine/refused_calls.h"

#include <atomic>
#include <iterator>

namespace tkt {
namespace {

constexpr const char* kNames[] = {"madvise", "mbind", "sched_setaffinity"};  // of OptionalCall
std::atomic<unsigned> refused{0};  // a bit each: a lock could be copied by fork() while a thread holds it

}  // namespace

void note_refused_call(OptionalCall call) { refused.fetch_or(1u << static_cast<unsigned>(call)); }

std::vector<std::string> refused_calls() {
  const unsigned found = refused.load();
  std::vector<std::string> names;
  for (unsigned call = 0; call < std::size(kNames); ++call) {
    if ((found >> call & 1u) != 0) names.emplace_back(kNames[call]);
  }
  return names;
}

}  // namespace tkt
