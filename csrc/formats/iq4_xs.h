// IQ4_XS as ggml defines it.
#pragma once

#include <cstdint>

#include "formats/decoded_block.h"
#include "formats/four_bit_values.h"

namespace tkt {

// 256 weights in 8 sub-blocks of 32, 4.25 bits each: w = d * (sc[j] - 32) * kValuesIQ4[q].
// The low 4 bits of sc[j] are nibble j of scales_l, the upper 2 bits 2 j and 2 j + 1 of scales_h. Quants of a sub-block
// as in Q4_0.
struct BlockIQ4_XS {
  uint16_t d;
  uint16_t scales_h;
  uint8_t scales_l[4];
  uint8_t qs[128];
};
static_assert(sizeof(BlockIQ4_XS) == 136, "ggml block size");

inline void decode(const BlockIQ4_XS& block, DecodedBlock& out) {
  out.sub_columns = 32;
  out.d = float_from_f16(block.d);
  set_no_minima(out);
  for (int j = 0; j < 8; ++j) {
    const int low = block.scales_l[j / 2] >> (j % 2 * 4) & 15;
    const int high = block.scales_h >> (2 * j) & 3;
    out.scale[j] = static_cast<float>((low | high << 4) - 32);
    for (int i = 0; i < 16; ++i) {
      const uint8_t two = block.qs[j * 16 + i];
      out.q[j * 32 + i] = kValuesIQ4[two & 15];
      out.q[j * 32 + i + 16] = kValuesIQ4[two >> 4];
    }
  }
}

}  // namespace tkt
