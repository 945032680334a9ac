// MXFP4 as ggml defines it.
#pragma once

#include <cstdint>

#include "formats/decoded_block.h"
#include "formats/four_bit_values.h"

namespace tkt {

// 32 weights, 4.25 bits each: w = 2^(e - 128) * kValuesE2M1[q]: the OCP format's E8M0 scale, halved. Quants as in Q4_0.
struct BlockMXFP4 {
  uint8_t e;
  uint8_t qs[16];
};
static_assert(sizeof(BlockMXFP4) == 17, "ggml block size");

inline void decode(const BlockMXFP4& block, DecodedBlock& out) {
  // Bits of 2^(e - 128): below e = 2 it is denormal.
  set_one_scale(out, 32, float_from_bits(block.e < 2 ? 0x00200000u << block.e : (block.e - 1u) << 23));
  for (int i = 0; i < 16; ++i) {
    out.q[i] = kValuesE2M1[block.qs[i] & 15];
    out.q[i + 16] = kValuesE2M1[block.qs[i] >> 4];
  }
}

}  // namespace tkt
