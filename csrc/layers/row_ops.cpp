#include "layers/row_ops.h"

#include "formats/panel_layout.h"
#include "formats/row_decoder.h"
#include "kernels/dispatch.h"
#include "machine/thread_pool.h"

namespace tkt {

void rms_norm_rows(const float* x, const float* weight, float eps, int64_t rows, int64_t width, float* out) {
  const KernelTable& table = kernels();
  parallel_for(rows, [&](int64_t row) { table.rms_norm(x + row * width, weight, eps, width, out + row * width); });
}

void add_rows(const float* residual, int64_t rows, int64_t width, float* values) {
  parallel_for(rows, [&](int64_t row) {
    for (int64_t i = row * width; i < (row + 1) * width; ++i) values[i] += residual[i];
  });
}

void embed_rows(const WeightTypeInfo& info, const uint8_t* matrix, const int64_t* ids, int64_t count, int64_t cols,
                float* out) {
  const int64_t bytes = row_bytes(info, cols);
  parallel_for(count, [&](int64_t i) { dequantize_row(info.type, matrix + ids[i] * bytes, cols, out + i * cols); });
}

}  // namespace tkt
