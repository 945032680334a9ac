// Weights of a block as numbers, decoded the way ggml defines them: for embeddings, for tests, and for the oracle.
#pragma once

#include <cstdint>

#include "formats/block_formats.h"
#include "formats/decoded_block.h"

namespace tkt {

void decode_block(WeightType type, const uint8_t* block, DecodedBlock& out);  // not for F32, F16, BF16

// cols must divide by the type's block size.
void dequantize_row(WeightType type, const uint8_t* row, int64_t cols, float* out);

float decode_float(WeightType type, const uint8_t* element);  // F32, F16, BF16

}  // namespace tkt
