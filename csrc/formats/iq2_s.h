// IQ2_S as ggml defines it.
#pragma once

#include <cstdint>

#include "formats/codebooks.h"
#include "formats/decoded_block.h"

namespace tkt {

// 256 weights in 16 sub-blocks of 16, 2.5625 bits each: w = d / 8 * (2 sc + 1) * weight of the grid, with its sign.
// For 8 weights: qs and 2 bits of qh, its place in the grid; signs, a bit each; nibble j of scales is sc[j].
struct BlockIQ2_S {
  uint16_t d;
  uint8_t qs[32];
  uint8_t signs[32];
  uint8_t qh[8];
  uint8_t scales[8];
};
static_assert(sizeof(BlockIQ2_S) == 82, "ggml block size");

inline void decode(const BlockIQ2_S& block, DecodedBlock& out) {
  out.sub_columns = 16;
  out.d = float_from_f16(block.d) / 8;
  set_no_minima(out);
  for (int j = 0; j < 16; ++j) out.scale[j] = static_cast<float>(2 * (block.scales[j / 2] >> (j % 2 * 4) & 15) + 1);
  for (int k = 0; k < 32; ++k) {
    const int high = block.qh[k / 4] >> (k % 4 * 2) & 3;
    store_signed(out.q + k * 8, kGridIQ2S[static_cast<size_t>(block.qs[k] | high << 8)], block.signs[k]);
  }
}

}  // namespace tkt
