// TQ1_0 as ggml defines it.
#pragma once

#include <cstdint>

#include "formats/decoded_block.h"

namespace tkt {

// 256 weights of -1, 0 or 1, 1.6875 bits each: w = d * (q - 1). A byte is a fraction of 256 whose digits in base 3 are
// 5 weights, 4 in qh. Digit n of byte i is weight 32 n + i of the first 160 (bytes 0-31), 16 n + i of the next 80
// (bytes 32-47), 4 n + i of the last 16 (qh).
struct BlockTQ1_0 {
  uint8_t qs[48];
  uint8_t qh[4];
  uint16_t d;
};
static_assert(sizeof(BlockTQ1_0) == 54, "ggml block size");

inline void decode(const BlockTQ1_0& block, DecodedBlock& out) {
  set_one_scale(out, 256, float_from_f16(block.d));
  int8_t* q = out.q;
  const auto digits = [&q](const uint8_t* bytes, int count, int places) {
    unsigned power = 1;
    for (int place = 0; place < places; ++place, power *= 3) {
      for (int i = 0; i < count; ++i)
        *q++ = static_cast<int8_t>(static_cast<int>((bytes[i] * power & 255) * 3 >> 8) - 1);
    }
  };
  digits(block.qs, 32, 5);
  digits(block.qs + 32, 16, 5);
  digits(block.qh, 4, 4);
}

}  // namespace tkt
