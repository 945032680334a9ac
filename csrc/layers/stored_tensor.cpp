#include "layers/stored_tensor.h"

#include <algorithm>
#include <string>
#include <system_error>
#include <utility>

#include "formats/damage.h"
#include "machine/file.h"
#include "machine/thread_pool.h"

namespace tkt {
namespace {

// About what one thread reads at a time into an array: the damage check finds it in cache.
constexpr int64_t kReadBytes = 256 << 10;
constexpr int64_t kMostReadsAtOnce = 16;

}  // namespace

ReadFailure::ReadFailure(int64_t part_, int64_t position_, int error_)
    : std::runtime_error("part " + std::to_string(part_) + " cannot be read at byte " + std::to_string(position_)),
      part(part_),
      position(position_),
      error(error_) {}

StoredTensor::StoredTensor(const WeightTypeInfo* info, std::vector<Part> parts, int64_t part_bytes)
    : info_(info), parts_(std::move(parts)), part_bytes_(part_bytes) {
  const int64_t count = static_cast<int64_t>(parts_.size());
  if (count == 0 || part_bytes < 1 || part_bytes % block_bytes() != 0 || part_bytes > INT64_MAX / 2 / count) {
    throw std::invalid_argument("a tensor has parts of whole blocks of " + std::to_string(block_bytes()) +
                                " bytes; got " + std::to_string(count) + " of " + std::to_string(part_bytes));
  }
}

void StoredTensor::read(ByteRange range, uint8_t* to) const {
  const int64_t part = range.first / part_bytes_;
  const int64_t start = range.first % part_bytes_;
  const auto [descriptor, offset] = parts_[static_cast<size_t>(part)];
  int64_t done = 0;
  try {
    done = read_at(descriptor, offset + start, range.end - range.first, to);
  } catch (const std::system_error& error) {
    throw ReadFailure(part, start, error.code().value());
  }
  if (done < range.end - range.first) throw ReadFailure(part, start + done, 0);
}

void StoredTensor::look_at(ByteRange range, const uint8_t* blocks) {
  const int64_t bytes = range.end - range.first;
  BlockFindings found{-1, false};
  if (info_ == nullptr) {
    found.has_values = !all_zero(blocks, bytes);
  } else {
    found = look_at_blocks(info_->type, blocks, bytes / block_bytes());
  }
  if (found.not_finite >= 0) {
    const int64_t block = range.first / block_bytes() + found.not_finite;
    int64_t before = not_finite_.load();
    while ((before < 0 || block < before) && !not_finite_.compare_exchange_weak(before, block)) {
    }
  }
  if (found.has_values) {
    if (!has_values_.load(std::memory_order_relaxed)) has_values_.store(true, std::memory_order_relaxed);
  } else if (all_zero(blocks, bytes)) {
    const std::lock_guard<std::mutex> lock(mutex_);
    zeros_.push_back(range);
  }
}

void StoredTensor::read_and_look_at(ByteRange range, uint8_t* to) {
  const int64_t most = std::max<int64_t>(1, kReadBytes / block_bytes()) * block_bytes();
  // Of each part that the range touches, in pieces from the beginning of the part.
  const int64_t pieces_each = (part_bytes_ + most - 1) / most;
  const int64_t first_piece = range.first / part_bytes_ * pieces_each + range.first % part_bytes_ / most;
  const int64_t end_piece = (range.end - 1) / part_bytes_ * pieces_each + (range.end - 1) % part_bytes_ / most + 1;
  parallel_for_nodes(
      {end_piece - first_piece},
      [&](int, int64_t first, int64_t end) {
        for (int64_t piece = first_piece + first; piece < first_piece + end; ++piece) {
          const int64_t part_start = piece / pieces_each * part_bytes_;
          const int64_t start = part_start + piece % pieces_each * most;
          const ByteRange bytes{std::max(range.first, start),
                                std::min({range.end, start + most, part_start + part_bytes_})};
          uint8_t* target = to + bytes.first - range.first;
          read(bytes, target);
          look_at(bytes, target);
        }
      },
      kMostReadsAtOnce);
}

std::vector<ByteRange> StoredTensor::zeros() const {
  std::vector<ByteRange> found;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    found = zeros_;
  }
  std::sort(found.begin(), found.end(), [](ByteRange a, ByteRange b) { return a.first < b.first; });
  std::vector<ByteRange> joined;
  for (const ByteRange& each : found) {
    if (!joined.empty() && joined.back().end == each.first) {
      joined.back().end = each.end;
    } else {
      joined.push_back(each);
    }
  }
  return joined;
}

}  // namespace tkt
