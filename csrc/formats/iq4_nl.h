// IQ4_NL as ggml defines it.
#pragma once

#include <cstdint>

#include "formats/decoded_block.h"
#include "formats/four_bit_values.h"

namespace tkt {

// 32 weights, 4.5 bits each: w = d * kValuesIQ4[q]. Quants as in Q4_0.
struct BlockIQ4_NL {
  uint16_t d;
  uint8_t qs[16];
};
static_assert(sizeof(BlockIQ4_NL) == 18, "ggml block size");

inline void decode(const BlockIQ4_NL& block, DecodedBlock& out) {
  set_one_scale(out, 32, float_from_f16(block.d));
  for (int i = 0; i < 16; ++i) {
    out.q[i] = kValuesIQ4[block.qs[i] & 15];
    out.q[i + 16] = kValuesIQ4[block.qs[i] >> 4];
  }
}

}  // namespace tkt
