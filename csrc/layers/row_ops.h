// Operations on rows of activations, on all threads.
#pragma once

#include <cstdint>

#include "formats/block_formats.h"

namespace tkt {

// out[rows][width] = the RMS norm of x[rows][width], times weight[width]; out may be x.
void rms_norm_rows(const float* x, const float* weight, float eps, int64_t rows, int64_t width, float* out);

// values[rows][width] += residual[rows][width]
void add_rows(const float* residual, int64_t rows, int64_t width, float* values);

// out[count][cols] = the rows ids[count] of a matrix of GGUF blocks, dequantized.
void embed_rows(const WeightTypeInfo& info, const uint8_t* matrix, const int64_t* ids, int64_t count, int64_t cols,
                float* out);

}  // namespace tkt
