// Optional system calls that the system refused, as sandboxes do: nothing is wrong without them, but slower.
#pragma once

#include <string>
#include <vector>

namespace tkt {

// `call` is a literal. Once for each is enough; from any thread.
void note_refused_call(const char* call);

std::vector<std::string> refused_calls();  // by name, each once

}  // namespace tkt
