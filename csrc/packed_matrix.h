// Quantized matrices in panels of 16 rows (layout: block_formats.h).
#pragma once

#include <cstdint>

#include "block_formats.h"
#include "memory.h"

namespace tkt {

// `count` matrices of rows x cols of one type: the experts of a layer, the heads of an attention, or just one. Owns its
// memory: ceil(rows / 16) * 16 rows per matrix, each of exactly the bytes it has in the file.
class PackedMatrix {
 public:
  // Throws std::invalid_argument where a size is not positive, cols is no multiple of the type's block, or the bytes
  // overflow; std::bad_alloc where memory is refused.
  PackedMatrix(WeightType type, int64_t count, int64_t rows, int64_t cols);

  // Packs matrix `index` from `rows` GGUF rows on all threads. The caller has checked that `source` holds them.
  void pack(int64_t index, const uint8_t* source);

  // Packs the matrices [0, count) whose rows are given as floats in source[index][row][col], converted to the type, which
  // must be F32 or F16.
  void pack_floats(const float* source);

  const WeightTypeInfo& info() const { return info_; }
  int64_t count() const { return count_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t blocks() const { return cols_ / info_.block_elements; }
  int64_t panels() const { return panels_; }
  int64_t source_bytes() const { return rows_ * row_bytes_; }  // of one matrix in the file
  int64_t nbytes() const { return count_ * panels_ * panel_bytes(); }
  const uint8_t* panel(int64_t index, int64_t panel) const {
    return memory_.data() + (index * panels_ + panel) * panel_bytes();
  }

 private:
  int64_t panel_bytes() const { return kPanelRows * row_bytes_; }

  const WeightTypeInfo& info_;
  int64_t count_;
  int64_t rows_;
  int64_t cols_;
  int64_t row_bytes_;
  int64_t panels_;
  WeightMemory memory_;
};

}  // namespace tkt
