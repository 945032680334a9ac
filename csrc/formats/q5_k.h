// Q5_K as ggml defines it.
#pragma once

#include <cstdint>
#include <cstring>

#include "formats/decoded_block.h"
#include "formats/q4_k.h"

namespace tkt {

// As Q4_K with a fifth bit, 5.5 bits each: bit j of qh[i] is bit 4 of weight i of sub-block j.
struct BlockQ5_K {
  uint16_t d;
  uint16_t dmin;
  uint8_t scales[12];
  uint8_t qh[32];
  uint8_t qs[128];
};
static_assert(sizeof(BlockQ5_K) == 176, "ggml block size");

inline void decode(const BlockQ5_K& block, DecodedBlock& out) {
  decode_six_bit_scales(block.scales, out);
  out.d = float_from_f16(block.d);
  out.dmin = float_from_f16(block.dmin);
  for (int i = 0; i < 256; ++i) {
    const int high = (block.qh[i % 32] >> (i / 32)) & 1;
    out.q[i] = static_cast<int8_t>(low_nibble_first(block.qs, i / 32, i % 32) | high << 4);
  }
}

}  // namespace tkt
