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

int64_t tile_count(const LinearTask& task) { return (task.tokens + kTaskTokens - 1) / kTaskTokens; }

// None on nodes that were not there when the matrix was packed.
PanelRange pairs_on(const LinearTask& task, int node) {
  return node < task.w->nodes() ? task.w->pairs_of_node(node) : PanelRange{0, 0};
}

// One pair of panels times up to kTaskTokens tokens.
void run_piece(const KernelTable& table, const LinearTask& task, int64_t pair, int64_t tile_index) {
  alignas(64) float tile[kTaskTokens * 32];
  const int64_t first_token = tile_index * kTaskTokens;
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

void for_each_row(int64_t rows, int64_t cols, const std::function<void(int64_t)>& body) {
  // A core quantizes 4 values a nanosecond; meeting the other threads takes it some microseconds.
  constexpr int64_t kFewValues = 16384;
  if (rows * cols <= kFewValues) {
    for (int64_t row = 0; row < rows; ++row) body(row);
  } else {
    parallel_for(rows, body);
  }
}

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
  if (format != ActivationFormat::kF32) for_each_row(rows, cols, [&](int64_t i) { quantize_row(i); });
}

void Activations::quantize_row(int64_t i) const {
  uint8_t* row = const_cast<uint8_t*>(rows_[static_cast<size_t>(i)]);
  if (format_ == ActivationFormat::kQ8) kernels().quantize_q8(x_ + i * stride_, cols_, row);
}

void run_linears(const std::vector<LinearTask>& tasks) {
  const KernelTable& table = kernels();
  size_t nodes = 0;
  for (const LinearTask& task : tasks) nodes = std::max(nodes, static_cast<size_t>(task.w->nodes()));
  std::vector<int64_t> totals(nodes, 0);
  std::vector<int64_t> ends(nodes * tasks.size());  // [node][task]
  for (size_t node = 0; node < nodes; ++node) {
    for (size_t i = 0; i < tasks.size(); ++i) {
      totals[node] += pairs_on(tasks[i], static_cast<int>(node)).count() * tile_count(tasks[i]);
      ends[node * tasks.size() + i] = totals[node];
    }
  }
  parallel_for_nodes(totals, [&](int node, int64_t piece) {
    const int64_t* ends_here = ends.data() + static_cast<size_t>(node) * tasks.size();
    const int64_t i = std::upper_bound(ends_here, ends_here + tasks.size(), piece) - ends_here;
    const LinearTask& task = tasks[static_cast<size_t>(i)];
    const int64_t offset = piece - (i == 0 ? 0 : ends_here[i - 1]);
    const PanelRange pairs = pairs_on(task, node);
    run_piece(table, task, pairs.first + offset % pairs.count(), offset / pairs.count());
  });
}

void linear(const PackedMatrix& w, int64_t index, const float* x, int64_t tokens, float* out) {
  const Activations activations(w.info().activation, x, tokens, w.cols(), w.cols());
  run_linears({{&w, index, activations.rows(), tokens, out, w.rows()}});
}

}  // namespace tkt
