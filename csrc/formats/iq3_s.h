// IQ3_S as ggml defines it.
#pragma once

#include <cstdint>

#include "formats/codebooks.h"
#include "formats/decoded_block.h"

namespace tkt {

// 256 weights in 8 sub-blocks of 32, 3.4375 bits each: w = d * (2 sc + 1) * weight of the grid, with its sign.
// qs and a bit of qh: a place in the grid for 4 weights; signs, a bit each; nibble j of scales is sc[j].
struct BlockIQ3_S {
  uint16_t d;
  uint8_t qs[64];
  uint8_t qh[8];
  uint8_t signs[32];
  uint8_t scales[4];
};
static_assert(sizeof(BlockIQ3_S) == 110, "ggml block size");

inline void decode(const BlockIQ3_S& block, DecodedBlock& out) {
  out.sub_columns = 32;
  out.d = float_from_f16(block.d);
  set_no_minima(out);
  for (int j = 0; j < 8; ++j) out.scale[j] = static_cast<float>(2 * (block.scales[j / 2] >> (j % 2 * 4) & 15) + 1);
  for (int k = 0; k < 32; ++k) {
    const auto four = [&](int i) {
      return uint64_t{kGridIQ3S[static_cast<size_t>(block.qs[i] | (block.qh[i / 8] >> (i % 8) & 1) << 8)]};
    };
    store_signed(out.q + k * 8, four(2 * k) | four(2 * k + 1) << 32, block.signs[k]);
  }
}

}  // namespace tkt
