#include "layers/packed_matrix.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "formats/f16.h"
#include "formats/pack_panel.h"
#include "formats/panel_layout.h"
#include "kernels/dispatch.h"
#include "machine/memory.h"
#include "machine/thread_pool.h"

namespace tkt {
namespace {

// What a thread reads at once: small beside its L2, large beside the price of a system call.
constexpr int64_t kReadBytes = 256 << 10;
// Between two looks whether it is to stop: 4 MB, 40 ms of a slow disk.
constexpr int64_t kReadsAtOnce = 16;

const WeightTypeInfo& checked(const WeightTypeInfo& info, int64_t count, int64_t rows, int64_t cols) {
  const std::string shape = shape_text(count, rows, cols);
  if (count < 1 || rows < 1 || cols < 1) throw std::invalid_argument("matrix sizes must be positive, got " + shape);
  if (cols % info.block_elements != 0) {
    throw std::invalid_argument(std::string(info.name) + " needs columns in multiples of " +
                                std::to_string(info.block_elements) + ", got " + shape);
  }
  int64_t bytes = cols / info.block_elements;
  int64_t padded_rows = 0;
  if (__builtin_mul_overflow(bytes, info.block_bytes, &bytes) ||
      __builtin_add_overflow(rows, kPanelRows - 1, &padded_rows) ||
      __builtin_mul_overflow(bytes, padded_rows, &bytes) || __builtin_mul_overflow(bytes, count, &bytes) ||
      bytes > INT64_MAX / 2) {
    throw std::invalid_argument("matrix of " + shape + " is larger than the address space");
  }
  return info;
}

}  // namespace

std::string shape_text(int64_t count, int64_t rows, int64_t cols) {
  return std::to_string(count) + " x " + std::to_string(rows) + " x " + std::to_string(cols);
}

std::string shape_text(const PackedMatrix* w) {
  return w == nullptr ? "nothing" : shape_text(w->count(), w->rows(), w->cols());
}

PackedMatrix::PackedMatrix(WeightType type, int64_t count, int64_t rows, int64_t cols)
    : info_(checked(info_of(type), count, rows, cols)),
      count_(count),
      rows_(rows),
      cols_(cols),
      row_bytes_(tkt::row_bytes(info_, cols)),
      panels_((rows + kPanelRows - 1) / kPanelRows) {
  const std::vector<NumaNode> nodes = topology().nodes;
  int64_t all_cores = 0;
  for (const NumaNode& node : nodes) all_cores += static_cast<int64_t>(node.cores.size());
  // Products take panels in pairs.
  const int64_t pairs = (panels_ + 1) / 2;
  int64_t cores = 0;
  int64_t first = 0;
  for (const NumaNode& node : nodes) {
    cores += static_cast<int64_t>(node.cores.size());
    const int64_t end = std::min(panels_, pairs * cores / all_cores * 2);
    std::unique_ptr<WeightMemory> memory;
    if (end > first) {
      memory = std::make_unique<WeightMemory>(static_cast<size_t>(count * (end - first) * panel_bytes()),
                                              nodes.size() == 1 ? WeightMemory::kWhereTouched : node.id);
    }
    parts_.push_back({{first, end}, std::move(memory)});
    first = end;
  }
}

Prefetch PackedMatrix::prefetch() const {
  const int set = prefetch_.load(std::memory_order_relaxed);
  return set == kNotSet ? default_prefetch(kernels().required_features) : static_cast<Prefetch>(set);
}

void PackedMatrix::set_prefetch(std::optional<Prefetch> strategy) {
  prefetch_.store(strategy ? static_cast<int>(*strategy) : kNotSet, std::memory_order_relaxed);
}

void PackedMatrix::for_each_run(int64_t count, int64_t run, int64_t most_at_once,
                                const std::function<void(int64_t, PanelRange)>& body) const {
  std::vector<int64_t> runs;  // of a matrix, on each node
  std::vector<int64_t> tasks;
  for (const Part& part : parts_) {
    runs.push_back((part.panels.count() + run - 1) / run);
    tasks.push_back(count * runs.back());
  }
  const auto do_range = [&](int node, int64_t first, int64_t end) {
    const PanelRange panels = parts_[static_cast<size_t>(node)].panels;
    const int64_t each = runs[static_cast<size_t>(node)];
    for (int64_t task = first; task < end; ++task) {
      const int64_t start = panels.first + task % each * run;
      body(task / each, {start, std::min(start + run, panels.end)});
    }
  };
  parallel_for_nodes(tasks, do_range, most_at_once);
}

void PackedMatrix::pack_panels(int64_t index, PanelRange panels, const uint8_t* rows) {
  for (int64_t p = panels.first; p < panels.end; ++p, rows += panel_bytes()) {
    pack_panel(info_, rows, static_cast<int>(rows_of({p, p + 1})), blocks(), const_cast<uint8_t*>(panel(index, p)));
  }
}

void PackedMatrix::pack(int64_t first_index, int64_t count, const uint8_t* source) {
  for_each_run(count, 1, kMostAtOnce, [&](int64_t index, PanelRange panels) {
    pack_panels(first_index + index, panels, source + (index * rows_ + panels.first * kPanelRows) * row_bytes_);
  });
}

void PackedMatrix::pack_stored(StoredTensor& source, int64_t first_index, int64_t count) {
  const int64_t run = std::max<int64_t>(1, kReadBytes / panel_bytes());
  for_each_run(count, run, kReadsAtOnce, [&](int64_t index, PanelRange panels) {
    const int64_t bytes = rows_of(panels) * row_bytes_;
    const int64_t start = ((first_index + index) * rows_ + panels.first * kPanelRows) * row_bytes_;
    const ScratchBuffer rows(static_cast<size_t>(bytes));
    source.read({start, start + bytes}, rows.bytes());
    // Panel by panel: what the check has touched is in L1 when it is packed.
    for (int64_t p = panels.first; p < panels.end; ++p) {
      const int64_t from = (p - panels.first) * panel_bytes();
      const int64_t end = from + rows_of({p, p + 1}) * row_bytes_;
      source.look_at({start + from, start + end}, rows.bytes() + from);
      pack_panels(first_index + index, {p, p + 1}, rows.bytes() + from);
    }
  });
}

void PackedMatrix::pack_floats(const float* source) {
  const bool half = info_.type == WeightType::kF16;
  if (!half && info_.type != WeightType::kF32) throw std::invalid_argument("pack_floats makes F32 or F16 matrices");
  for_each_run(count_, 1, kMostAtOnce, [&](int64_t index, PanelRange panels) {
    const float* values = source + (index * rows_ + panels.first * kPanelRows) * cols_;
    if (!half) return pack_panels(index, panels, reinterpret_cast<const uint8_t*>(values));
    std::vector<uint16_t> halves(static_cast<size_t>(rows_of(panels) * cols_));
    for (size_t i = 0; i < halves.size(); ++i) halves[i] = f16_from_float(values[i]);
    pack_panels(index, panels, reinterpret_cast<const uint8_t*>(halves.data()));
  });
}

void PackedMatrix::read_panels(int64_t index, uint8_t* to) const {
  parallel_for(panels_, [&](int64_t panel) {
    std::memcpy(to + panel * panel_bytes(), this->panel(index, panel), static_cast<size_t>(panel_bytes()));
  });
}

}  // namespace tkt
