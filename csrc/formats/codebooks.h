// Codebooks of the types whose quants are positions in a grid, as ggml defines them: 4 or 8 weights at once, the first
// in the lowest byte.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace tkt {

extern const std::array<uint64_t, 256> kGridIQ2XXS;
extern const std::array<uint64_t, 512> kGridIQ2XS;
extern const std::array<uint64_t, 1024> kGridIQ2S;
extern const std::array<uint32_t, 256> kGridIQ3XXS;
extern const std::array<uint32_t, 512> kGridIQ3S;
extern const std::array<uint64_t, 2048> kGridIQ1S;  // IQ1_M has the same

}  // namespace tkt
