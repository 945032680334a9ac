// Weights of a block as numbers, whatever its type.
#pragma once

#include <cstdint>
#include <cstring>

#include "formats/f16.h"

namespace tkt {

// w[i] = d * scale[j] * q[i] - dmin * min[j] with j = i / sub_columns, for every type of ggml: quants of codebook types
// are the integers that the codebook has at that place, and powers of two that a type multiplies by go into d. Scales
// and minima are integers below 2^8 but for NVFP4, whose scales are E4M3 numbers.
struct DecodedBlock {
  int8_t q[256];
  float scale[16];
  float min[16];
  int sub_columns;
  float d;
  float dmin;
};

inline void set_one_scale(DecodedBlock& out, int columns, float d) {
  out.sub_columns = columns;
  out.scale[0] = 1.0f;
  out.min[0] = 0.0f;
  out.d = d;
  out.dmin = 0.0f;
}

inline void set_no_minima(DecodedBlock& out) {
  out.dmin = 0.0f;
  for (float& min : out.min) min = 0.0f;
}

// 8 weights of a grid with the signs of bits 0 to 7: 1 is minus. No weight of a grid is 0, so that no byte carries.
inline void store_signed(int8_t* q, uint64_t grid, uint32_t signs) {
  const uint64_t bits = ((signs & 0xff) * 0x0101010101010101u) & 0x8040201008040201u;
  const uint64_t minus = ((bits + 0x7f7f7f7f7f7f7f7fu) & 0x8080808080808080u) >> 7;
  const uint64_t weights = (grid ^ (minus * 0xff)) + minus;
  std::memcpy(q, &weights, 8);
}

// Signs of 8 weights of which 7 are stored: the number of minuses is even.
inline uint32_t even_signs(uint32_t seven) {
  seven &= 0x7f;
  return seven | static_cast<uint32_t>(__builtin_parity(seven)) << 7;
}

}  // namespace tkt
