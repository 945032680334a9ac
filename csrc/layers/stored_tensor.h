// A tensor in its file: read in pieces by the threads that use them, and looked over for damage meanwhile.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "formats/block_formats.h"

namespace tkt {

struct ByteRange {
  int64_t first;
  int64_t end;
};

// A tensor that could not be read.
struct ReadFailure : std::runtime_error {
  ReadFailure(int64_t part, int64_t position, int error);

  int64_t part;
  int64_t position;  // within the part: what lies before it is there
  int error;         // of errno; 0 at the end of the file
};

class StoredTensor {
 public:
  struct Part {
    int descriptor;
    int64_t offset;
  };

  // `parts` follow each other and have `part_bytes` each. Of a type without kernels (null) only zeros are looked for.
  // Throws std::invalid_argument where there is no part, or where one holds no whole blocks.
  StoredTensor(const WeightTypeInfo* info, std::vector<Part> parts, int64_t part_bytes);

  // Reads whole blocks within one part to `to`. Throws ReadFailure.
  void read(ByteRange range, uint8_t* to) const;

  // `blocks` are those of the range, whole ones. From several threads at once, in any order.
  void look_at(ByteRange range, const uint8_t* blocks);

  // Both, on all threads, for any range of whole blocks.
  void read_and_look_at(ByteRange range, uint8_t* to);

  const WeightTypeInfo* info() const { return info_; }
  int64_t block_bytes() const { return info_ == nullptr ? 1 : info_->block_bytes; }
  int64_t nbytes() const { return static_cast<int64_t>(parts_.size()) * part_bytes_; }
  int64_t part_bytes() const { return part_bytes_; }

  // What was found so far.
  int64_t not_finite() const { return not_finite_.load(); }  // the first block, -1 for none
  bool has_values() const { return has_values_.load(); }
  std::vector<ByteRange> zeros() const;  // nothing but zero bytes, in order, neighbours joined; in steps of looks

 private:
  const WeightTypeInfo* info_;
  const std::vector<Part> parts_;
  const int64_t part_bytes_;
  std::atomic<int64_t> not_finite_{-1};
  std::atomic<bool> has_values_{false};
  mutable std::mutex mutex_;
  std::vector<ByteRange> zeros_;
};

}  // namespace tkt
