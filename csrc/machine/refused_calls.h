// Optional system calls that the system refused, as sandboxes do: nothing is wrong without them, but slower.
#pragma once

#include <string>
#include <vector>

namespace tkt {

enum class OptionalCall { kMadvise, kMbind, kSchedSetaffinity };

void note_refused_call(OptionalCall call);  // from any thread

std::vector<std::string> refused_calls();  // their names, each once

}  // namespace tkt
