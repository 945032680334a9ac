#include "layers/linear.h"

#include <algorithm>
#include <cstring>

#include "kernels/dispatch.h"
#include "machine/thread_pool.h"

namespace tkt {
namespace {

// Tokens per task: their quantized rows (64 x 2 KB at 2,048 columns) stay in L2 while the panels pass.
constexpr int64_t kTaskTokens = 64;

int64_t buffer_bytes(ActivationFormat format, int64_t rows, int64_t cols) {
  return format == ActivationFormat::kF32 ? 0 : rows * activation_row_bytes(format, cols);
}

int64_t tile_count(const LinearTask& task) { return (task.tokens + kTaskTokens - 1) / kTaskTokens; }

// Panels of each matrix of a task that lie on a node, taken `at_once`: 1 or 2. None on nodes that were not there when
// the matrix was packed.
struct NodePanels {
  PanelRange panels;
  int64_t at_once;

  NodePanels(const LinearTask& task, int node, int64_t take)
      : panels(node < task.w->nodes() ? task.w->panels_of_node(node) : PanelRange{0, 0}), at_once(take) {}
  int64_t takes() const { return (panels.count() + at_once - 1) / at_once; }
  PanelRange of_takes(int64_t first, int64_t end) const {
    return {panels.first + first * at_once, std::min(panels.end, panels.first + end * at_once)};
  }
};

// Neighbouring panels of a matrix times its one token, the last rows apart where they are no whole panel.
void multiply_one_token(const KernelTable& table, const LinearTask& task, int64_t matrix, PanelRange panels) {
  const PackedMatrix& w = *task.w;
  const Prefetch prefetch = w.prefetch();
  const auto gemv = [&](int64_t first, int64_t count, float* out) {
    table.gemv[static_cast<int>(w.info().type)]({w.panel(task.index + matrix, first), count, w.panel_bytes(),
                                                 w.blocks(), task.activations[matrix], out, prefetch});
  };
  float* out = task.out + matrix * task.matrix_stride;
  const int64_t whole_end = std::min(panels.end, w.rows() / kPanelRows);
  if (whole_end > panels.first) gemv(panels.first, whole_end - panels.first, out + panels.first * kPanelRows);
  if (whole_end < panels.end) {
    alignas(64) float last[kPanelRows];
    gemv(whole_end, 1, last);
    std::memcpy(out + whole_end * kPanelRows, last, sizeof(float) * static_cast<size_t>(w.rows() % kPanelRows));
  }
}

// One or two panels of a matrix times up to kTaskTokens tokens.
void multiply_tile(const KernelTable& table, const LinearTask& task, int64_t matrix, PanelRange panels,
                   int64_t tile_index) {
  alignas(64) float tile[kTaskTokens * 32];
  const int64_t first_token = tile_index * kTaskTokens;
  const int64_t first_row = panels.first * kPanelRows;

  DotArgs args;
  args.panel_count = static_cast<int>(panels.count());
  for (int p = 0; p < args.panel_count; ++p) args.panels[p] = task.w->panel(task.index + matrix, panels.first + p);
  args.blocks = task.w->blocks();
  args.activations = task.activations + matrix * task.tokens + first_token;
  args.tokens = static_cast<int>(std::min(kTaskTokens, task.tokens - first_token));
  args.out = tile;
  args.prefetch = task.w->prefetch();
  table.dot[static_cast<int>(task.w->info().type)](args);

  const int64_t rows = std::min<int64_t>(panels.count() * kPanelRows, task.w->rows() - first_row);
  float* out = task.out + matrix * task.matrix_stride + first_token * task.token_stride + first_row;
  for (int t = 0; t < args.tokens; ++t) {
    std::memcpy(out + t * task.token_stride, tile + t * 32, sizeof(float) * static_cast<size_t>(rows));
  }
}

// Takes [first, end) of a task: of each matrix and each kTaskTokens tokens of it, all panels that are here.
void run_takes(const KernelTable& table, const LinearTask& task, const NodePanels& here, int64_t first, int64_t end) {
  while (first < end) {
    const int64_t pass = first / here.takes();
    const int64_t end_of_pass = std::min(end, (pass + 1) * here.takes());
    const int64_t matrix = pass / tile_count(task);
    const PanelRange panels = here.of_takes(first - pass * here.takes(), end_of_pass - pass * here.takes());
    if (task.tokens == 1) {
      multiply_one_token(table, task, matrix, panels);
    } else {
      for (int64_t panel = panels.first; panel < panels.end; panel += here.at_once) {
        multiply_tile(table, task, matrix, {panel, std::min(panels.end, panel + here.at_once)},
                      pass % tile_count(task));
      }
    }
    first = end_of_pass;
  }
}

// Panels that a thread takes at once: one where there are so few that threads would go without. V3's router has 8
// pairs.
int64_t panels_at_once(const std::vector<LinearTask>& tasks) {
  constexpr int64_t kPairsPerThread = 2;
  int64_t pairs = 0;
  for (const LinearTask& task : tasks) pairs += (task.w->panels() + 1) / 2 * task.matrices * tile_count(task);
  return pairs < kPairsPerThread * thread_count() ? 1 : 2;
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
  const int64_t at_once = panels_at_once(tasks);
  size_t nodes = 0;
  for (const LinearTask& task : tasks) nodes = std::max(nodes, static_cast<size_t>(task.w->nodes()));
  std::vector<int64_t> totals(nodes, 0);
  std::vector<int64_t> ends(nodes * tasks.size());  // [node][task]
  for (size_t node = 0; node < nodes; ++node) {
    for (size_t i = 0; i < tasks.size(); ++i) {
      const LinearTask& task = tasks[i];
      totals[node] += NodePanels(task, static_cast<int>(node), at_once).takes() * tile_count(task) * task.matrices;
      ends[node * tasks.size() + i] = totals[node];
    }
  }
  parallel_for_nodes(totals, [&](int node, int64_t first, int64_t end) {
    const int64_t* ends_here = ends.data() + static_cast<size_t>(node) * tasks.size();
    size_t i = static_cast<size_t>(std::upper_bound(ends_here, ends_here + tasks.size(), first) - ends_here);
    while (first < end) {
      const int64_t begin_of_task = i == 0 ? 0 : ends_here[i - 1];
      const int64_t end_here = std::min(end, ends_here[i]);
      if (end_here > first) {
        run_takes(table, tasks[i], NodePanels(tasks[i], node, at_once), first - begin_of_task,
                  end_here - begin_of_task);
      }
      first = end_here;
      ++i;
    }
  });
}

void linear(const PackedMatrix& w, int64_t index, const float* x, int64_t tokens, float* out) {
  const Activations activations(w.info().activation, x, tokens, w.cols(), w.cols());
  run_linears({{&w, index, 1, activations.rows(), tokens, out, 0, w.rows()}});
}

}  // namespace tkt
