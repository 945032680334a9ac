// Quantized matrices in panels of 16 rows (layout: block_formats.h).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "formats/block_formats.h"
#include "kernels/prefetch.h"
#include "layers/stored_tensor.h"
#include "machine/memory.h"

namespace tkt {

struct PanelRange {
  int64_t first;
  int64_t end;

  int64_t count() const { return end - first; }
};

// `count` matrices of rows x cols of one type: the experts of a layer, the heads of an attention, or just one. Owns its
// memory: ceil(rows / 16) * 16 rows per matrix, each of exactly the bytes it has in the file. Of every matrix each NUMA
// node has some neighbouring panels, in proportion to its cores: all nodes' memory is read at once, and nothing is
// there twice.
class PackedMatrix {
 public:
  // Throws std::invalid_argument where a size is not positive, cols is no multiple of the type's block, or the bytes
  // overflow; std::bad_alloc where memory is refused.
  PackedMatrix(WeightType type, int64_t count, int64_t rows, int64_t cols);

  // Packs the matrices [first_index, first_index + count) from their GGUF rows on all threads. The caller has checked
  // that `source` holds these, one after the other. Much at once: a call for each expert of V2-Lite (1.6 MB) would take
  // most new pages from the system on one thread while the other waits.
  void pack(int64_t first_index, int64_t count, const uint8_t* source);

  // The same from the file: each thread reads what it packs, a few panels at a time, so that they are packed out of its
  // cache. The caller has checked that `source` has the type and the size of all matrices, and a number of parts that
  // divides theirs. Throws ReadFailure.
  void pack_stored(StoredTensor& source, int64_t first_index, int64_t count);

  // Packs the matrices [0, count) whose rows are given as floats in source[index][row][col], converted to the type,
  // which must be F32 or F16.
  void pack_floats(const float* source);

  // Copies all panels of a matrix, those of all nodes, to panels() * panel_bytes() bytes.
  void read_panels(int64_t index, uint8_t* to) const;

  const WeightTypeInfo& info() const { return info_; }
  int64_t count() const { return count_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t blocks() const { return cols_ / info_.block_elements; }
  int64_t panels() const { return panels_; }
  int64_t row_bytes() const { return row_bytes_; }  // of one row in the file
  int64_t panel_bytes() const { return kPanelRows * row_bytes_; }
  int64_t nbytes() const { return count_ * panels_ * panel_bytes(); }
  const uint8_t* panel(int64_t index, int64_t panel) const {
    const Part* part = parts_.data();
    while (panel >= part->panels.end) ++part;
    return part->memory->data() + (index * part->panels.count() + panel - part->panels.first) * panel_bytes();
  }

  // How products with this matrix prefetch: as set, else what suits the CPU and the kernels in use.
  Prefetch prefetch() const;
  void set_prefetch(std::optional<Prefetch> strategy);

  // Nodes of the topology() in which the matrix was made, by position. Panels 2n and 2n + 1 are on the same one; a node
  // may have none.
  int nodes() const { return static_cast<int>(parts_.size()); }
  PanelRange panels_of_node(int node) const { return parts_[static_cast<size_t>(node)].panels; }
  // The same counted in pairs; a last one may have a single panel.
  PanelRange pairs_of_node(int node) const {
    const PanelRange panels = panels_of_node(node);
    return {panels.first / 2, (panels.end + 1) / 2};
  }

 private:
  static constexpr int kNotSet = -1;

  struct Part {
    PanelRange panels;
    std::unique_ptr<WeightMemory> memory;  // null where there are no panels
  };

  // body(index, panels) for runs of up to `run` panels that together are all of matrices [0, count), on all threads.
  // A range of `most_at_once` runs is what a thread does before it looks whether it is to stop.
  void for_each_run(int64_t count, int64_t run, int64_t most_at_once,
                    const std::function<void(int64_t, PanelRange)>& body) const;

  int64_t rows_of(PanelRange panels) const {
    return std::min(rows_, panels.end * kPanelRows) - panels.first * kPanelRows;
  }
  void pack_panels(int64_t index, PanelRange panels, const uint8_t* rows);

  const WeightTypeInfo& info_;
  int64_t count_;
  int64_t rows_;
  int64_t cols_;
  int64_t row_bytes_;
  int64_t panels_;
  std::vector<Part> parts_;
  std::atomic<int> prefetch_{kNotSet};
};

// "4 x 64 x 32" for count x rows x cols; "nothing" for null.
std::string shape_text(int64_t count, int64_t rows, int64_t cols);
std::string shape_text(const PackedMatrix* w);

}  // namespace tkt
