// What the quants of 4 bits stand for that are positions in a table, as ggml and the OCP microscaling formats define
// it.
#pragma once

#include <cstdint>

namespace tkt {

// Twice the values of E2M1, so that they are integers; their scale is halved.
constexpr int8_t kValuesE2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
constexpr int8_t kValuesIQ4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
// The bits of kValuesIQ4 + 128: unsigned bytes, for products of those.
constexpr int8_t kShiftedIQ4[16] = {1, 24, 45, 63, 79, 93, 106, 118, -127, -115, -103, -90, -75, -59, -39, -15};
constexpr bool is_shifted_by_128() {
  for (int i = 0; i < 16; ++i) {
    if (static_cast<uint8_t>(kShiftedIQ4[i]) != kValuesIQ4[i] + 128) return false;
  }
  return true;
}
static_assert(is_shifted_by_128());

}  // namespace tkt
