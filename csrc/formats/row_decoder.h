// Weights of a block as numbers, decoded the way ggml defines them: for embeddings, for tests, and for the oracle.
#pragma once

#include <cstdint>

#include "formats/block_formats.h"

namespace tkt {

// w[i] = d * scale[j] * q[i] - dmin * min[j] with j = i / sub_columns. Types without sub-blocks have one scale of 1.
struct DecodedBlock {
  int8_t q[256];
  int scale[16];
  int min[16];
  int sub_blocks;
  float d;
  float dmin;
};

DecodedBlock decode_block(WeightType type, const uint8_t* block);  // not for F32, F16, BF16

// cols must divide by the type's block size.
void dequantize_row(WeightType type, const uint8_t* row, int64_t cols, float* out);

float decode_float(WeightType type, const uint8_t* element);  // F32, F16, BF16

}  // namespace tkt
