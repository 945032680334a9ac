#include "packed_matrix.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "f16.h"
#include "panel_layout.h"
#include "thread_pool.h"

namespace tkt {
namespace {

size_t checked_bytes(const WeightTypeInfo& info, int64_t count, int64_t rows, int64_t cols) {
  const std::string shape = std::to_string(count) + " x " + std::to_string(rows) + " x " + std::to_string(cols);
  if (count < 1 || rows < 1 || cols < 1) throw std::invalid_argument("matrix sizes must be positive, got " + shape);
  if (cols % info.block_elements != 0) {
    throw std::invalid_argument(std::string(info.name) + " needs columns in multiples of " +
                                std::to_string(info.block_elements) + ", got " + shape);
  }
  const int64_t padded_rows = (rows + kPanelRows - 1) / kPanelRows * kPanelRows;
  int64_t bytes = row_bytes(info, cols);
  if (__builtin_mul_overflow(bytes, padded_rows, &bytes) || __builtin_mul_overflow(bytes, count, &bytes) ||
      bytes > INT64_MAX / 2) {
    throw std::invalid_argument("matrix of " + shape + " is larger than the address space");
  }
  return static_cast<size_t>(bytes);
}

}  // namespace

PackedMatrix::PackedMatrix(WeightType type, int64_t count, int64_t rows, int64_t cols)
    : info_(info_of(type)),
      count_(count),
      rows_(rows),
      cols_(cols),
      row_bytes_(row_bytes(info_, cols)),
      panels_((rows + kPanelRows - 1) / kPanelRows),
      memory_(checked_bytes(info_, count, rows, cols)) {}

void PackedMatrix::pack(int64_t index, const uint8_t* source) {
  parallel_for(panels_, [&](int64_t p) {
    const int64_t first = p * kPanelRows;
    const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, rows_ - first));
    pack_panel(info_, source + first * row_bytes_, rows, blocks(), const_cast<uint8_t*>(panel(index, p)));
  });
}

void PackedMatrix::pack_floats(const float* source) {
  const bool half = info_.type == WeightType::kF16;
  if (!half && info_.type != WeightType::kF32) throw std::invalid_argument("pack_floats makes F32 or F16 matrices");
  parallel_for(count_ * panels_, [&](int64_t task) {
    const int64_t index = task / panels_;
    const int64_t first = task % panels_ * kPanelRows;
    const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, rows_ - first));
    const float* values = source + (index * rows_ + first) * cols_;
    uint8_t* target = const_cast<uint8_t*>(panel(index, task % panels_));
    if (!half) {
      pack_panel(info_, reinterpret_cast<const uint8_t*>(values), rows, blocks(), target);
      return;
    }
    std::vector<uint16_t> halves(static_cast<size_t>(rows * cols_));
    for (size_t i = 0; i < halves.size(); ++i) halves[i] = f16_from_float(values[i]);
    pack_panel(info_, reinterpret_cast<const uint8_t*>(halves.data()), rows, blocks(), target);
  });
}

}  // namespace tkt
