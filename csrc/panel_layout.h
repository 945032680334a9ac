// Between GGUF rows and panels of 16 rows (layout: block_formats.h). Plain copies, but for the order of upper bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "block_formats.h"

namespace tkt {

constexpr int kMostUnits = 52;  // of a block, in Q6_K

inline int64_t row_bytes(const WeightTypeInfo& info, int64_t cols) {
  return cols / info.block_elements * info.block_bytes;
}

// Where the leading scales of a block stand in a panel, and, in one of `blocks` blocks, its first unit.
inline int64_t scales_position(const WeightTypeInfo& info, int64_t block) {
  const int64_t block_bytes = int64_t{info.block_bytes} * kPanelRows;
  return block / 2 * 2 * block_bytes + block % 2 * kPanelRows * 2;
}
inline int64_t units_position(const WeightTypeInfo& info, int64_t blocks, int64_t block) {
  const int64_t block_bytes = int64_t{info.block_bytes} * kPanelRows;
  if (info.scale_offset < 0) return block * block_bytes;
  const int64_t even = block / 2 * 2;
  const int64_t scale_bytes = (even + 1 < blocks ? 2 : 1) * kPanelRows * 2;
  return even * block_bytes + scale_bytes + block % 2 * info.unit_count * kPanelRows * info.unit_bytes;
}

// The bit at index i goes to index i / 2 + 16 (i % 2): the 5 bits of the index turn right by one.
inline uint32_t even_bits_first(uint32_t x) {
  const auto swap = [&x](uint32_t mask, int distance) {
    const uint32_t differing = (x ^ (x >> distance)) & mask;
    x ^= differing | differing << distance;
  };
  swap(0x22222222, 1);
  swap(0x0c0c0c0c, 2);
  swap(0x00f000f0, 4);
  swap(0x0000ff00, 8);
  return x;
}

// Exchanges the bits of `mask` in b with those that lie `distance` higher in a.
inline void exchange(uint32_t& a, uint32_t& b, uint32_t mask, int distance) {
  const uint32_t differing = ((a >> distance) ^ b) & mask;
  b ^= differing;
  a ^= differing << distance;
}

inline bool has_upper_bits(WeightType type) {
  return type == WeightType::kQ5_0 || type == WeightType::kQ5_K || type == WeightType::kQ6_K;
}

// Upper bits of a block's units (u32 in order of the file) to the order of a panel, or, with `back`, back.
//
// Q5_0: bit 4 g + k to bit 8 k + g: the index turns by two; three turns more are a full circle of five.
// Q5_K: per byte of a unit qh[g], 2 bits for each of 4 chunks. 4 units of 4 chunks become 4 chunks of 4 units: in each
// four the pairs of bits of a byte are transposed. Q6_K: per byte of a unit, 2 bits for each of 4 quarters q; chunks are
// the quarters p and p + 2, so that 2 units of 2 chunks are transposed. Both are their own inverse.
inline void regroup_upper_bits(WeightType type, uint8_t* units, bool back) {
  constexpr uint32_t kPairs = 0x33333333;
  constexpr uint32_t kFours = 0x0f0f0f0f;
  uint32_t x[16];
  if (type == WeightType::kQ5_0) {
    std::memcpy(x, units, 4);
    for (int turn = 0; turn < (back ? 3 : 2); ++turn) x[0] = even_bits_first(x[0]);
    std::memcpy(units, x, 4);
  } else if (type == WeightType::kQ5_K) {
    std::memcpy(x, units + 4 * 4, 32);
    for (uint32_t* four = x; four < x + 8; four += 4) {
      exchange(four[0], four[2], kFours, 4);
      exchange(four[1], four[3], kFours, 4);
      exchange(four[0], four[1], kPairs, 2);
      exchange(four[2], four[3], kPairs, 2);
    }
    std::memcpy(units + 4 * 4, x, 32);
  } else if (type == WeightType::kQ6_K) {
    std::memcpy(x, units + 32 * 4, 64);
    for (int pair = 0; pair < 16; pair += 2) exchange(x[pair], x[pair + 1], kPairs, 2);
    std::memcpy(units + 32 * 4, x, 64);
  }
}

// Packs `rows` (1..16) consecutive GGUF rows of `blocks` blocks; the lanes of missing rows become zero.
inline void pack_panel(const WeightTypeInfo& info, const uint8_t* source, int rows, int64_t blocks, uint8_t* panel) {
  const int64_t stride = blocks * info.block_bytes;
  if (rows < kPanelRows) std::memset(panel, 0, static_cast<size_t>(stride * kPanelRows));
  int place[kMostUnits];  // in bytes
  for (int u = 0; u < info.unit_count; ++u) place[u] = unit_place(info.type, u) * kPanelRows * info.unit_bytes;
  uint8_t regrouped[kMostUnits * 4];
  for (int64_t b = 0; b < blocks; ++b) {
    uint8_t* to = panel + units_position(info, blocks, b);
    for (int lane = 0; lane < rows; ++lane, to += info.unit_bytes) {
      const uint8_t* block = source + lane * stride + b * info.block_bytes;
      const uint8_t* units = block + info.unit_offset;
      if (has_upper_bits(info.type)) {
        std::memcpy(regrouped, units, static_cast<size_t>(info.unit_bytes * info.unit_count));
        regroup_upper_bits(info.type, regrouped, false);
        units = regrouped;
      }
      if (info.unit_bytes == 4) {
        for (int u = 0; u < info.unit_count; ++u) std::memcpy(to + place[u], units + u * 4, 4);
      } else {
        for (int u = 0; u < info.unit_count; ++u) std::memcpy(to + place[u], units + u * 2, 2);
      }
      if (info.scale_offset >= 0) {
        std::memcpy(panel + scales_position(info, b) + lane * 2, block + info.scale_offset, 2);
      }
    }
  }
}

// Takes one block of one row back out, byte for byte as it stood in the file.
inline void read_block(const WeightTypeInfo& info, const uint8_t* panel, int64_t blocks, int64_t block, int lane,
                       uint8_t* out) {
  const uint8_t* units = panel + units_position(info, blocks, block) + lane * info.unit_bytes;
  for (int u = 0; u < info.unit_count; ++u) {
    std::memcpy(out + info.unit_offset + u * info.unit_bytes,
                units + unit_place(info.type, u) * kPanelRows * info.unit_bytes, static_cast<size_t>(info.unit_bytes));
  }
  regroup_upper_bits(info.type, out + info.unit_offset, true);
  if (info.scale_offset >= 0) {
    std::memcpy(out + info.scale_offset, panel + scales_position(info, block) + lane * 2, 2);
  }
}

}  // namespace tkt
