// Q4_1 as ggml defines it.
#pragma once

#include <cstdint>

#include "formats/decoded_block.h"

namespace tkt {

// 32 weights, 5 bits each: w = d * q + m. Quants as in Q4_0.
struct BlockQ4_1 {
  uint16_t d;
  uint16_t m;
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ4_1) == 20, "ggml block size");

inline void decode(const BlockQ4_1& block, DecodedBlock& out) {
  set_one_scale(out, 32, float_from_f16(block.d));
  out.min[0] = 1.0f;
  out.dmin = -float_from_f16(block.m);
  for (int i = 0; i < 16; ++i) {
    out.q[i] = block.qs[i] & 15;
    out.q[i + 16] = block.qs[i] >> 4;
  }
}

}  // namespace tkt
