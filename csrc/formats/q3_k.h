// Q3_K as ggml defines it.
#pragma once

#include <cstdint>

#include "formats/decoded_block.h"

namespace tkt {

// 256 weights in 16 sub-blocks of 16, 3.4375 bits each: w = d * (sc[j] - 32) * (q - 4).
// qs: the low 2 bits as in Q2_K; bit j of hmask[i] is bit 2 of weight 32 j + i.
// scales: sc[0..7] have their low 4 bits in the low nibbles of bytes 0-7, sc[8..15] in the high ones; bits 2k and 2k +
// 1 of byte 8 + i are the upper bits of sc[4 k + i].
struct BlockQ3_K {
  uint8_t hmask[32];
  uint8_t qs[64];
  uint8_t scales[12];
  uint16_t d;
};
static_assert(sizeof(BlockQ3_K) == 110, "ggml block size");

inline void decode(const BlockQ3_K& block, DecodedBlock& out) {
  out.sub_columns = 16;
  out.d = float_from_f16(block.d);
  set_no_minima(out);
  for (int j = 0; j < 16; ++j) {
    const int low = block.scales[j % 8] >> (j / 8 * 4) & 15;
    const int high = block.scales[8 + j % 4] >> (j / 4 * 2) & 3;
    out.scale[j] = static_cast<float>((low | high << 4) - 32);
  }
  for (int i = 0; i < 256; ++i) {
    const int low = block.qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
    const int high = block.hmask[i % 32] >> (i / 32) & 1;
    out.q[i] = static_cast<int8_t>((low | high << 2) - 4);
  }
}

}  // namespace tkt
