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
#include "machine/thread_pool.h"

namespace tkt {
namespace {

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

void PackedMatrix::for_each_panel(int64_t count, PanelRange panels,
                                  const std::function<void(int64_t, int64_t)>& body) const {
  std::vector<PanelRange> ranges;  // of each node
  std::vector<int64_t> tasks;
  for (const Part& part : parts_) {
    const int64_t first = std::max(part.panels.first, panels.first);
    ranges.push_back({first, std::max(first, std::min(part.panels.end, panels.end))});
    tasks.push_back(count * ranges.back().count());
  }
  parallel_for_nodes(tasks, [&](int node, int64_t first, int64_t end) {
    const PanelRange range = ranges[static_cast<size_t>(node)];
    for (int64_t task = first; task < end; ++task) body(task / range.count(), range.first + task % range.count());
  });
}

void PackedMatrix::pack(int64_t first_index, int64_t count, PanelRange panels, const uint8_t* source) {
  const int64_t first_row = panels.first * kPanelRows;
  const int64_t rows_each = std::min(rows_, panels.end * kPanelRows) - first_row;
  for_each_panel(count, panels, [&](int64_t index, int64_t p) {
    const int64_t row = p * kPanelRows;
    const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, rows_ - row));
    const uint8_t* from = source + (index * rows_each + row - first_row) * row_bytes_;
    pack_panel(info_, from, rows, blocks(), const_cast<uint8_t*>(panel(first_index + index, p)));
  });
}

void PackedMatrix::pack_floats(const float* source) {
  const bool half = info_.type == WeightType::kF16;
  if (!half && info_.type != WeightType::kF32) throw std::invalid_argument("pack_floats makes F32 or F16 matrices");
  for_each_panel(count_, {0, panels_}, [&](int64_t index, int64_t p) {
    const int64_t first = p * kPanelRows;
    const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, rows_ - first));
    const float* values = source + (index * rows_ + first) * cols_;
    uint8_t* target = const_cast<uint8_t*>(panel(index, p));
    if (!half) {
      pack_panel(info_, reinterpret_cast<const uint8_t*>(values), rows, blocks(), target);
      return;
    }
    std::vector<uint16_t> halves(static_cast<size_t>(rows * cols_));
    for (size_t i = 0; i < halves.size(); ++i) halves[i] = f16_from_float(values[i]);
    pack_panel(info_, reinterpret_cast<const uint8_t*>(halves.data()), rows, blocks(), target);
  });
}

void PackedMatrix::read_panels(int64_t index, uint8_t* to) const {
  parallel_for(panels_, [&](int64_t panel) {
    std::memcpy(to + panel * panel_bytes(), this->panel(index, panel), static_cast<size_t>(panel_bytes()));
  });
}

}  // namespace tkt
