// IQ2_XXS as ggml defines it.
#pragma once

#include <cstdint>

#include "formats/codebooks.h"
#include "formats/decoded_block.h"

namespace tkt {

// 256 weights in 8 sub-blocks of 32, 2.0625 bits each: w = d / 8 * (2 sc + 1) * weight of the grid, with its sign.
// qs: 8 bytes a sub-block: 4 places in the grid, then 32 bits with 4 times 7 signs and sc in the upper 4.
struct BlockIQ2_XXS {
  uint16_t d;
  uint8_t qs[64];
};
static_assert(sizeof(BlockIQ2_XXS) == 66, "ggml block size");

inline void decode(const BlockIQ2_XXS& block, DecodedBlock& out) {
  out.sub_columns = 32;
  out.d = float_from_f16(block.d) / 8;
  set_no_minima(out);
  for (int j = 0; j < 8; ++j) {
    uint32_t bits;
    std::memcpy(&bits, block.qs + j * 8 + 4, 4);
    out.scale[j] = static_cast<float>(2 * (bits >> 28) + 1);
    for (int k = 0; k < 4; ++k) {
      store_signed(out.q + j * 32 + k * 8, kGridIQ2XXS[block.qs[j * 8 + k]], even_signs(bits >> (7 * k)));
    }
  }
}

}  // namespace tkt
