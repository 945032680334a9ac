// Reading of files that somebody else may write to meanwhile.
#pragma once

#include <cstdint>

namespace tkt {

// Reads `bytes` bytes from `offset` on to `to`; how many there were, fewer only at the end of the file. Throws
// std::system_error.
int64_t read_at(int descriptor, int64_t offset, int64_t bytes, uint8_t* to);

}  // namespace tkt
