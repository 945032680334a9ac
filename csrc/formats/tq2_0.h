// TQ2_0 as ggml defines it.
#pragma once

#include <cstdint>

#include "formats/decoded_block.h"

namespace tkt {

// 256 weights of -1, 0 or 1, 2.0625 bits each: w = d * (q - 1). Quants as in Q2_K.
struct BlockTQ2_0 {
  uint8_t qs[64];
  uint16_t d;
};
static_assert(sizeof(BlockTQ2_0) == 66, "ggml block size");

inline void decode(const BlockTQ2_0& block, DecodedBlock& out) {
  set_one_scale(out, 256, float_from_f16(block.d));
  for (int i = 0; i < 256; ++i) {
    out.q[i] = static_cast<int8_t>((block.qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3) - 1);
  }
}

}  // namespace tkt
