// IQ3_XXS as ggml defines it.
#pragma once

#include <cstdint>

#include "formats/codebooks.h"
#include "formats/decoded_block.h"

namespace tkt {

// 256 weights in 8 sub-blocks of 32, 3.0625 bits each: w = d / 4 * (2 sc + 1) * weight of the grid, with its sign.
// qs: a place in the grid for 4 weights. scales: 4 bytes a sub-block, 4 times 7 signs and sc in the upper 4 bits.
struct BlockIQ3_XXS {
  uint16_t d;
  uint8_t qs[64];
  uint8_t scales[32];
};
static_assert(sizeof(BlockIQ3_XXS) == 98, "ggml block size");

inline void decode(const BlockIQ3_XXS& block, DecodedBlock& out) {
  out.sub_columns = 32;
  out.d = float_from_f16(block.d) / 4;
  set_no_minima(out);
  for (int j = 0; j < 8; ++j) {
    uint32_t bits;
    std::memcpy(&bits, block.scales + j * 4, 4);
    out.scale[j] = static_cast<float>(2 * (bits >> 28) + 1);
    for (int k = 0; k < 4; ++k) {
      const uint8_t* two = block.qs + j * 8 + k * 2;
      const uint64_t grid = kGridIQ3XXS[two[0]] | uint64_t{kGridIQ3XXS[two[1]]} << 32;
      store_signed(out.q + j * 32 + k * 8, grid, even_signs(bits >> (7 * k)));
    }
  }
}

}  // namespace tkt
