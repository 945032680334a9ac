// Q2_K as ggml defines it.
#pragma once

#include <cstdint>

#include "formats/decoded_block.h"

namespace tkt {

// 256 weights in 16 sub-blocks of 16, 2.625 bits each: w = d * (scales[j] & 15) * q - dmin * (scales[j] >> 4).
// qs: 2 halves of 32 bytes; bits 2s and 2s + 1 of byte l of a half are its weight 32 s + l.
struct BlockQ2_K {
  uint8_t scales[16];
  uint8_t qs[64];
  uint16_t d;
  uint16_t dmin;
};
static_assert(sizeof(BlockQ2_K) == 84, "ggml block size");

inline void decode(const BlockQ2_K& block, DecodedBlock& out) {
  out.sub_columns = 16;
  out.d = float_from_f16(block.d);
  out.dmin = float_from_f16(block.dmin);
  for (int j = 0; j < 16; ++j) {
    out.scale[j] = static_cast<float>(block.scales[j] & 15);
    out.min[j] = static_cast<float>(block.scales[j] >> 4);
  }
  for (int i = 0; i < 256; ++i) out.q[i] = block.qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
}

}  // namespace tkt
