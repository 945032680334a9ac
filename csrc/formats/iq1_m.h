// IQ1_M as ggml defines it.
#pragma once

#include <cstdint>

#include "formats/decoded_block.h"
#include "formats/iq1_s.h"

namespace tkt {

// 256 weights in 16 sub-blocks of 16, 1.75 bits each: w = d * (2 sc + 1) * (weight of the grid, -1, 0 or 1, plus or
// minus 1/8). For 8 weights: qs and 3 bits of a nibble of qh, its place in the grid; the nibble's highest bit, whether
// 1/8 is taken away.
// scales: 4 times 3 bits of sc in each, and a quarter of d, an f16, in the upper 4.
struct BlockIQ1_M {
  uint8_t qs[32];
  uint8_t qh[16];
  uint16_t scales[4];
};
static_assert(sizeof(BlockIQ1_M) == 56, "ggml block size");

// Of a weight in eighths.
inline float scale_of(const BlockIQ1_M& block) {
  uint16_t d = 0;
  for (int i = 0; i < 4; ++i) d = static_cast<uint16_t>(d | block.scales[i] >> 12 << (4 * i));
  return float_from_f16(d) / 8;
}

inline void decode(const BlockIQ1_M& block, DecodedBlock& out) {
  out.sub_columns = 16;
  out.d = scale_of(block);
  set_no_minima(out);
  for (int j = 0; j < 16; ++j) out.scale[j] = static_cast<float>(2 * (block.scales[j / 4] >> (j % 4 * 3) & 7) + 1);
  for (int k = 0; k < 32; ++k) {
    const int nibble = block.qh[k / 2] >> (k % 2 * 4);
    store_eighths(out.q + k * 8, block.qs[k] | (nibble & 7) << 8, (nibble & 8) != 0);
  }
}

}  // namespace tkt
