// Q5_1 as ggml defines it.
#pragma once

#include <cstdint>

#include "formats/decoded_block.h"

namespace tkt {

// 32 weights, 6 bits each: w = d * q + m. Quants as in Q5_0.
struct BlockQ5_1 {
  uint16_t d;
  uint16_t m;
  uint8_t qh[4];
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ5_1) == 24, "ggml block size");

inline void decode(const BlockQ5_1& block, DecodedBlock& out) {
  set_one_scale(out, 32, float_from_f16(block.d));
  out.min[0] = 1.0f;
  out.dmin = -float_from_f16(block.m);
  for (int i = 0; i < 32; ++i) {
    const int low = i < 16 ? block.qs[i] & 15 : block.qs[i - 16] >> 4;
    const int high = block.qh[i / 8] >> (i % 8) & 1;
    out.q[i] = static_cast<int8_t>(low | high << 4);
  }
}

}  // namespace tkt
