#include "linear.h"

#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "thread_pool.h"

namespace tkt {
namespace {

// Tokens per task: their quantized rows (64 x 2 KB at 2,048 columns) stay in L2 while the panels pass.
constexpr int64_t kTaskTokens = 64;

int64_t buffer_bytes(ActivationFormat format, int64_t rows, int64_t cols) {
  return format == ActivationFormat::kF32 ? 0 : rows * activation_row_bytes(format, cols);
}

int64_t task_count(const LinearTask& task) {
  return (task.w->panels() + 1) / 2 * ((task.tokens + kTaskTokens - 1) / kTaskTokens);
}

// One pair of panels times up to kTaskTokens tokens.
void run_piece(const KernelTable& table, const LinearTask& task, int64_t piece) {
  alignas(64) float tile[kTaskTokens * 32];
  const int64_t pairs = (task.w->panels() + 1) / 2;
  const int64_t pair = piece % pairs;
  const int64_t first_token = piece / pairs * kTaskTokens;
  const int64_t first_row = pair * 2 * kPanelRows;

  DotArgs args;
  args.panel_count = static_cast<int>(std::min<int64_t>(2, task.w->panels() - pair * 2));
  for (int p = 0; p < args.panel_count; ++p) args.panels[p] = task.w->panel(task.index, pair * 2 + p);
  args.blocks = task.w->blocks();
  args.activations = task.activations + first_token;
  args.tokens = static_cast<int>(std::min(kTaskTokens, task.tokens - first_token));
  args.out = tile;
  table.dot[static_cast<int>(task.w->info().type)](args);

  const size_t row_bytes = sizeof(float) * static_cast<size_t>(std::min<int64_t>(32, task.w->rows() - first_row));
  for (int t = 0; t < args.tokens; ++t) {
    std::memcpy(task.out + (first_token + t) * task.out_stride + first_row, tile + t * 32, row_bytes);
  }
}

}  // namespace

Activations::Activations(Deferred, ActivationFormat format, const float* x, int64_t rows, int64_t cols, int64_t stride)
    : format_(format),
      x_(x),
      cols_(cols),
      stride_(stride),
      buffer_(static_cast<size_t>(buffer_bytes(format, rows, cols))),
      rows_(static_cast<size_t>(rows)) {
  const int64_t bytes = activation_row_bytes(format, cols);
  for (int64_t i = 0; i < rows; ++i) {
    rows_[static_cast<size_t>(i)] = format == ActivationFormat::kF32 ? reinterpret_cast<const uint8_t*>(x + i * stride)
                                                                     : buffer_.bytes() + i * bytes;
  }
}

Activations::Activations(ActivationFormat format, const float* x, int64_t rows, int64_t cols, int64_t stride)
    : Activations(Deferred{}, format, x, rows, cols, stride) {
  if (format != ActivationFormat::kF32) parallel_for(rows, [&](int64_t i) { quantize_row(i); });
}

void Activations::quantize_row(int64_t i) const {
  uint8_t* row = const_cast<uint8_t*>(rows_[static_cast<size_t>(i)]);
  if (format_ == ActivationFormat::kQ8) kernels().quantize_q8(x_ + i * stride_, cols_, row);
}

void run_linears(const std::vector<LinearTask>& tasks) {
  const KernelTable& table = kernels();
  std::vector<int64_t> ends;
  int64_t total = 0;
  for (const LinearTask& task : tasks) ends.push_back(total += task_count(task));
  parallel_for(total, [&](int64_t piece) {
    const size_t i = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), piece) - ends.begin());
    run_piece(table, tasks[i], piece - (i == 0 ? 0 : ends[i - 1]));
  });
}

void linear(const PackedMatrix& w, int64_t index, const float* x, int64_t tokens, float* out) {
  const Activations activations(w.info().activation, x, tokens, w.cols(), w.cols());
  run_linears({{&w, index, activations.rows(), tokens, out, w.rows()}});
}

}  // namespace tkt
