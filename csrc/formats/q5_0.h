// Q5_0 as ggml defines it.
#pragma once

#include <cstdint>
#include <cstring>

#include "formats/decoded_block.h"

namespace tkt {

// 32 weights, 5.5 bits each: w = d * (q - 16). Bit i of qh is bit 4 of weight i; qs as in Q4_0.
struct BlockQ5_0 {
  uint16_t d;
  uint8_t qh[4];
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ5_0) == 22, "ggml block size");

inline void decode(const BlockQ5_0& block, DecodedBlock& out) {
  set_one_scale(out, 32, float_from_f16(block.d));
  for (int i = 0; i < 32; ++i) {
    const int low = i < 16 ? block.qs[i] & 15 : block.qs[i - 16] >> 4;
    const int high = (block.qh[i / 8] >> (i % 8)) & 1;
    out.q[i] = static_cast<int8_t>((low | high << 4) - 16);
  }
}

}  // namespace tkt
