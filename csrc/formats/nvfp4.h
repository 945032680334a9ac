// NVFP4 as ggml defines it.
#pragma once

#include <cstdint>

#include "formats/decoded_block.h"
#include "formats/four_bit_values.h"

namespace tkt {

// 64 weights in 4 sub-blocks of 16, 4.5 bits each: w = d[j] / 2 * kValuesE2M1[q], d an unsigned E4M3 number. Of a
// sub-block's 8 bytes the low nibbles are weights 0 to 7, the high ones 8 to 15.
struct BlockNVFP4 {
  uint8_t d[4];
  uint8_t qs[32];
};
static_assert(sizeof(BlockNVFP4) == 36, "ggml block size");

inline void decode(const BlockNVFP4& block, DecodedBlock& out) {
  out.sub_columns = 16;
  out.d = 1.0f;
  set_no_minima(out);
  for (int j = 0; j < 4; ++j) {
    const int exponent = block.d[j] >> 3 & 15;
    const int mantissa = block.d[j] & 7;
    // (1 + mantissa / 8) * 2^(exponent - 7) / 2, denormal where the exponent is 0; 0x7f is no number and counts as 0.
    const int integer = exponent == 0 ? mantissa : (8 + mantissa) << (exponent - 1);
    out.scale[j] = block.d[j] == 0x7f ? 0.0f : static_cast<float>(integer) * (1.0f / 1024.0f);
    for (int i = 0; i < 8; ++i) {
      out.q[j * 16 + i] = kValuesE2M1[block.qs[j * 8 + i] & 15];
      out.q[j * 16 + i + 8] = kValuesE2M1[block.qs[j * 8 + i] >> 4];
    }
  }
}

}  // namespace tkt
