// IQ1_S as ggml defines it.
#pragma once

#include <cstdint>

#include "formats/codebooks.h"
#include "formats/decoded_block.h"

namespace tkt {

// 256 weights in 8 sub-blocks of 32, 1.5625 bits each: w = d * (2 sc + 1) * (weight of the grid, -1, 0 or 1, plus or
// minus 1/8). For 8 weights: qs and 3 bits of qh, its place in the grid. qh of a sub-block: 4 times 3 bits, sc, and in
// the highest bit whether 1/8 is taken away.
struct BlockIQ1_S {
  uint16_t d;
  uint8_t qs[32];
  uint16_t qh[8];
};
static_assert(sizeof(BlockIQ1_S) == 50, "ggml block size");

// 8 weights of the grid in eighths, plus or minus one eighth. IQ1_M's are the same.
inline void store_eighths(int8_t* q, int place, bool minus) {
  const uint64_t grid = kGridIQ1S[static_cast<size_t>(place)];
  int8_t weights[8];
  std::memcpy(weights, &grid, 8);
  for (int i = 0; i < 8; ++i) q[i] = static_cast<int8_t>(8 * weights[i] + (minus ? -1 : 1));
}

inline void decode(const BlockIQ1_S& block, DecodedBlock& out) {
  out.sub_columns = 32;
  out.d = float_from_f16(block.d) / 8;
  set_no_minima(out);
  for (int j = 0; j < 8; ++j) {
    out.scale[j] = static_cast<float>(2 * (block.qh[j] >> 12 & 7) + 1);
    for (int k = 0; k < 4; ++k) {
      const int place = block.qs[j * 4 + k] | (block.qh[j] >> (3 * k) & 7) << 8;
      store_eighths(out.q + j * 32 + k * 8, place, (block.qh[j] & 0x8000) != 0);
    }
  }
}

}  // namespace tkt
