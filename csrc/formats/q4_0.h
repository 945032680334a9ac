// Q4_0 as ggml defines it.
#pragma once

#include <cstdint>
#include <cstring>

#include "formats/decoded_block.h"

namespace tkt {

// 32 weights, 4.5 bits each: w = d * (q - 8). qs[i]: low nibble = weight i, high nibble = weight i + 16.
struct BlockQ4_0 {
  uint16_t d;
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ4_0) == 18, "ggml block size");

inline void decode(const BlockQ4_0& block, DecodedBlock& out) {
  set_one_scale(out, 32, float_from_f16(block.d));
  for (int i = 0; i < 16; ++i) {
    out.q[i] = static_cast<int8_t>((block.qs[i] & 15) - 8);
    out.q[i + 16] = static_cast<int8_t>((block.qs[i] >> 4) - 8);
  }
}

}  // namespace tkt
