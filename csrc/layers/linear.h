// Matrix products y = W x over packed matrices, the building block of every other operation.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "layers/packed_matrix.h"
#include "machine/memory.h"

namespace tkt {

// body(row) for each row of `cols` values, on all threads where that pays.
void for_each_row(int64_t rows, int64_t cols, const std::function<void(int64_t)>& body);

// Activation rows in one format, quantized from floats.
class Activations {
 public:
  // Quantizes now. Row i is taken from x + i * stride; F32 rows are used where they stand, so x must outlive
  // this.
  Activations(ActivationFormat format, const float* x, int64_t rows, int64_t cols, int64_t stride);

  struct Deferred {};
  // Leaves the rows to calls of quantize_row from the caller's own parallel loop.
  Activations(Deferred, ActivationFormat format, const float* x, int64_t rows, int64_t cols, int64_t stride);
  void quantize_row(int64_t i) const;

  const uint8_t* row(int64_t i) const { return rows_[static_cast<size_t>(i)]; }
  const uint8_t* const* rows() const { return rows_.data(); }

 private:
  ActivationFormat format_;
  const float* x_;
  int64_t cols_;
  int64_t stride_;
  ScratchBuffer buffer_;
  std::vector<const uint8_t*> rows_;
};

// out[m][token][row] = dot(w[index + m][row], activations[m][token]) for each m in [0, matrices).
struct LinearTask {
  const PackedMatrix* w;
  int64_t index;
  int64_t matrices;
  const uint8_t* const* activations;  // [matrices][tokens], in w's format
  int64_t tokens;
  float* out;
  int64_t matrix_stride;  // floats from one matrix's results to the next one's
  int64_t token_stride;   // and from one token's
};

// All tasks in one parallel loop.
void run_linears(const std::vector<LinearTask>& tasks);

// out[tokens][rows] = x[tokens][cols] W[index]^T
void linear(const PackedMatrix& w, int64_t index, const float* x, int64_t tokens, float* out);

}  // namespace tkt
