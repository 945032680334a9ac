// Q4_K as ggml defines it.
#pragma once

#include <cstdint>
#include <cstring>

#include "formats/decoded_block.h"

namespace tkt {

// 256 weights in 8 sub-blocks of 32, 4.5 bits each: w = d * sc[j] * q - dmin * m[j].
// scales: 8 pairs (sc, m) of 6 bits: bytes 0-3 hold sc[0..3], bytes 4-7 m[0..3] in their low 6 bits; bytes 8-11 hold
// the low 4 bits of sc[4..7] and m[4..7]; their upper 2 bits sit in the top of bytes 0-3 and 4-7.
// qs: 4 chunks of 32 bytes; chunk c: low nibbles = sub-block 2c, high nibbles = sub-block 2c + 1.
struct BlockQ4_K {
  uint16_t d;
  uint16_t dmin;
  uint8_t scales[12];
  uint8_t qs[128];
};
static_assert(sizeof(BlockQ4_K) == 144, "ggml block size");

// Scales and minima of Q4_K and Q5_K.
inline void decode_six_bit_scales(const uint8_t* scales, DecodedBlock& out) {
  out.sub_columns = 32;
  for (int j = 0; j < 4; ++j) {
    out.scale[j] = static_cast<float>(scales[j] & 63);
    out.min[j] = static_cast<float>(scales[j + 4] & 63);
    out.scale[j + 4] = static_cast<float>((scales[j + 8] & 15) | (scales[j] >> 6) << 4);
    out.min[j + 4] = static_cast<float>((scales[j + 8] >> 4) | (scales[j + 4] >> 6) << 4);
  }
}

inline int low_nibble_first(const uint8_t* qs, int sub_block, int i) {
  const uint8_t byte = qs[sub_block / 2 * 32 + i];
  return sub_block % 2 == 0 ? byte & 15 : byte >> 4;
}

inline void decode(const BlockQ4_K& block, DecodedBlock& out) {
  decode_six_bit_scales(block.scales, out);
  out.d = float_from_f16(block.d);
  out.dmin = float_from_f16(block.dmin);
  for (int i = 0; i < 256; ++i) out.q[i] = static_cast<int8_t>(low_nibble_first(block.qs, i / 32, i % 32));
}

}  // namespace tkt
