// Between GGUF rows and panels of 16 rows (layout: block_formats.h). Plain copies, but for the order of bits in a `bit_unit`.
#pragma once

#include <cstdint>
#include <cstring>

#include "block_formats.h"

namespace tkt {

constexpr int kMostUnits = 52;  // of a block, in Q6_K

inline int64_t row_bytes(const WeightTypeInfo& info, int64_t cols) {
  return cols / info.block_elements * info.block_bytes;
}

// Where the scales of a block stand in a panel of `blocks` blocks, and its unit 0.
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
  int place[kMostUnits];  // in bytes
  for (int u = 0; u < info.unit_count; ++u) place[u] = unit_place(info.type, u) * kPanelRows * info.unit_bytes;
  for (int64_t b = 0; b < blocks; ++b) {
    uint8_t* units = panel + units_position(info, blocks, b);
    for (int lane = 0; lane < rows; ++lane) {
      const uint8_t* block = source + lane * stride + b * info.block_bytes;
      const uint8_t* from = block + info.unit_offset;
      uint8_t* to = units + lane * info.unit_bytes;
      if (info.unit_bytes == 4) {
        for (int u = 0; u < info.unit_count; ++u) std::memcpy(to + place[u], from + u * 4, 4);
      } else {
        for (int u = 0; u < info.unit_count; ++u) std::memcpy(to + place[u], from + u * 2, 2);
      }
      if (info.bit_unit >= 0) group_bits_by_byte(to + place[info.bit_unit]);
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
  if (info.bit_unit >= 0) ungroup_bits(out + info.unit_offset + info.bit_unit * info.unit_bytes);
  if (info.scale_offset >= 0) {
    std::memcpy(out + info.scale_offset, panel + scales_position(info, block) + lane * 2, 2);
  }
}

}  // namespace tkt
