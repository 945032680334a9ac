// Q6_K as ggml defines it.
#pragma once

#include <cstdint>
#include <cstring>

#include "formats/decoded_block.h"

namespace tkt {

// 256 weights in 16 sub-blocks of 16, 6.5625 bits each: w = d * scales[j] * (q - 32).
// Per half of 128 weights: ql[64] holds the low 4 bits (weights l and l + 64 share byte l), qh[32] the upper 2 bits of
// weights l, l + 32, l + 64, l + 96 in bits 0-1, 2-3, 4-5, 6-7 of byte l.
struct BlockQ6_K {
  uint8_t ql[128];
  uint8_t qh[64];
  int8_t scales[16];
  uint16_t d;
};
static_assert(sizeof(BlockQ6_K) == 210, "ggml block size");

inline void decode(const BlockQ6_K& block, DecodedBlock& out) {
  out.sub_columns = 16;
  out.d = float_from_f16(block.d);
  set_no_minima(out);
  for (int j = 0; j < 16; ++j) out.scale[j] = static_cast<float>(block.scales[j]);
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128;
    const int within = i % 128;
    const uint8_t low_byte = block.ql[half * 64 + within % 64];
    const int low = within < 64 ? low_byte & 15 : low_byte >> 4;
    const int high = (block.qh[half * 32 + within % 32] >> (within / 32 * 2)) & 3;
    out.q[i] = static_cast<int8_t>((low | high << 4) - 32);
  }
}

}  // namespace tkt
