// Q8_0 as ggml defines it.
#pragma once

#include <cstdint>
#include <cstring>

#include "formats/decoded_block.h"

namespace tkt {

// 32 weights, 8.5 bits each: w = d * q.
struct BlockQ8_0 {
  uint16_t d;
  int8_t qs[32];
};
static_assert(sizeof(BlockQ8_0) == 34, "ggml block size");

inline void decode(const BlockQ8_0& block, DecodedBlock& out) {
  set_one_scale(out, 32, float_from_f16(block.d));
  std::memcpy(out.q, block.qs, 32);
}

}  // namespace tkt
