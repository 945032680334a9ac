// Between GGUF rows and panels of 16 rows (layout: block_formats.h). Plain copies, but for the order of bits in a `bit_unit`.
#pragma once

#include <cstdint>
#include <cstring>

#include "block_formats.h"

namespace tkt {

inline int64_t row_bytes(const WeightTypeInfo& info, int64_t cols) {
  return cols / info.block_elements * info.block_bytes;
}

inline int64_t unit_position(const WeightTypeInfo& info, int64_t block, int unit, int lane) {
  return ((block * info.unit_count + unit) * kPanelRows + lane) * info.unit_bytes;
}

inline int64_t scale_position(const WeightTypeInfo& info, int64_t blocks, int64_t block, int lane) {
  return blocks * info.unit_count * kPanelRows * info.unit_bytes + (block * kPanelRows + lane) * 2;
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

// Bit 4 g + k to bit 8 k + g: the index turns by two. Three turns more are a full circle of five.
inline void group_bits_by_byte(uint8_t* word) {
  uint32_t x;
  std::memcpy(&x, word, 4);
  x = even_bits_first(even_bits_first(x));
  std::memcpy(word, &x, 4);
}
inline void ungroup_bits(uint8_t* word) {
  uint32_t x;
  std::memcpy(&x, word, 4);
  x = even_bits_first(even_bits_first(even_bits_first(x)));
  std::memcpy(word, &x, 4);
}

// Packs `rows` (1..16) consecutive GGUF rows of `blocks` blocks; the lanes of missing rows become zero.
inline void pack_panel(const WeightTypeInfo& info, const uint8_t* source, int rows, int64_t blocks, uint8_t* panel) {
  const int64_t stride = blocks * info.block_bytes;
  if (rows < kPanelRows) std::memset(panel, 0, static_cast<size_t>(stride * kPanelRows));
  for (int64_t b = 0; b < blocks; ++b) {
    for (int lane = 0; lane < rows; ++lane) {
      const uint8_t* block = source + lane * stride + b * info.block_bytes;
      uint8_t* target = panel + unit_position(info, b, 0, lane);
      const uint8_t* units = block + info.unit_offset;
      if (info.unit_bytes == 4) {
        for (int u = 0; u < info.unit_count; ++u) std::memcpy(target + u * kPanelRows * 4, units + u * 4, 4);
      } else {
        for (int u = 0; u < info.unit_count; ++u) std::memcpy(target + u * kPanelRows * 2, units + u * 2, 2);
      }
      if (info.bit_unit >= 0) group_bits_by_byte(panel + unit_position(info, b, info.bit_unit, lane));
      if (info.scale_offset >= 0) {
        std::memcpy(panel + scale_position(info, blocks, b, lane), block + info.scale_offset, 2);
      }
    }
  }
}

// Takes one block of one row back out, byte for byte as it stood in the file.
inline void read_block(const WeightTypeInfo& info, const uint8_t* panel, int64_t blocks, int64_t block, int lane,
                       uint8_t* out) {
  for (int u = 0; u < info.unit_count; ++u) {
    std::memcpy(out + info.unit_offset + u * info.unit_bytes, panel + unit_position(info, block, u, lane),
                static_cast<size_t>(info.unit_bytes));
  }
  if (info.bit_unit >= 0) ungroup_bits(out + info.unit_offset + info.bit_unit * info.unit_bytes);
  if (info.scale_offset >= 0) {
    std::memcpy(out + info.scale_offset, panel + scale_position(info, blocks, block, lane), 2);
  }
}

}  // namespace tkt
