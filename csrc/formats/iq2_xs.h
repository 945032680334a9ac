// IQ2_XS as ggml defines it.
#pragma once

#include <cstdint>

#include "formats/codebooks.h"
#include "formats/decoded_block.h"

namespace tkt {

// 256 weights in 16 sub-blocks of 16, 2.3125 bits each: w = d / 8 * (2 sc + 1) * weight of the grid, with its sign.
// qs: for 8 weights a place in the grid in the low 9 bits and 7 signs above it; nibble j of scales is sc[j].
struct BlockIQ2_XS {
  uint16_t d;
  uint16_t qs[32];
  uint8_t scales[8];
};
static_assert(sizeof(BlockIQ2_XS) == 74, "ggml block size");

inline void decode(const BlockIQ2_XS& block, DecodedBlock& out) {
  out.sub_columns = 16;
  out.d = float_from_f16(block.d) / 8;
  set_no_minima(out);
  for (int j = 0; j < 16; ++j) out.scale[j] = static_cast<float>(2 * (block.scales[j / 2] >> (j % 2 * 4) & 15) + 1);
  for (int k = 0; k < 32; ++k) {
    store_signed(out.q + k * 8, kGridIQ2XS[block.qs[k] & 511], even_signs(block.qs[k] >> 9));
  }
}

}  // namespace tkt
