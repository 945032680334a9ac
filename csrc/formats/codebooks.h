// Codebooks of the types whose quants are positions in a table, as ggml and the OCP microscaling formats define them. Grids
// give 4 or 8 weights at once, the first in the lowest byte.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace tkt {

// Twice the values of E2M1, so that they are integers; their scale is halved.
constexpr int8_t kValuesE2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
constexpr int8_t kValuesIQ4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

extern const std::array<uint64_t, 256> kGridIQ2XXS;
extern const std::array<uint64_t, 512> kGridIQ2XS;
extern const std::array<uint64_t, 1024> kGridIQ2S;
extern const std::array<uint32_t, 256> kGridIQ3XXS;
extern const std::array<uint32_t, 512> kGridIQ3S;
extern const std::array<uint64_t, 2048> kGridIQ1S;  // IQ1_M has the same

}  // namespace tkt
