// Where the parts of a GGUF block stand in a panel of 16 rows (layout: block_formats.h), and the order of upper bits.
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

// Words below are units of 4 bytes, of one row or, as uint64_t, of two rows beside each other.
template <typename Word>
inline Word in_each_unit(uint32_t mask) {
  return static_cast<Word>(uint64_t{mask} << 32 | mask);
}

// The bit at index i of a unit goes to index i / 2 + 16 (i % 2): the 5 bits of the index turn right by one.
template <typename Word>
inline Word even_bits_first(Word x) {
  const auto swap = [&x](uint32_t mask, int distance) {
    const Word differing = (x ^ (x >> distance)) & in_each_unit<Word>(mask);
    x ^= differing | differing << distance;
  };
  swap(0x22222222, 1);
  swap(0x0c0c0c0c, 2);
  swap(0x00f000f0, 4);
  swap(0x0000ff00, 8);
  return x;
}

// Exchanges the bits of `mask` in b with those that lie `distance` higher in a.
template <typename Word>
inline void exchange(Word& a, Word& b, Word mask, int distance) {
  const Word differing = ((a >> distance) ^ b) & mask;
  b ^= differing;
  a ^= differing << distance;
}

// Upper bits among a block's units, given in the order of the file, to the order of a panel, or, with `back`, back.
//
// Q5_0: bit 4 g + k to bit 8 k + g: the index turns by two; three turns more are a full circle of five.
// Q5_K: per byte of a unit qh[g], 2 bits for each of 4 chunks. 4 units of 4 chunks become 4 chunks of 4 units: in each
// four the pairs of bits of a byte are transposed. Q6_K: per byte of a unit, 2 bits for each of 4 quarters q; chunks are
// the quarters p and p + 2, so that 2 units of 2 chunks are transposed. Both are their own inverse.
template <typename Word>
inline void regroup_upper_bits(WeightType type, Word* units, bool back) {
  const Word pairs = in_each_unit<Word>(0x33333333);
  const Word fours = in_each_unit<Word>(0x0f0f0f0f);
  if (type == WeightType::kQ5_0) {
    for (int turn = 0; turn < (back ? 3 : 2); ++turn) units[0] = even_bits_first(units[0]);
  } else if (type == WeightType::kQ5_K) {
    for (Word* four = units + 4; four < units + 12; four += 4) {
      exchange(four[0], four[2], fours, 4);
      exchange(four[1], four[3], fours, 4);
      exchange(four[0], four[1], pairs, 2);
      exchange(four[2], four[3], pairs, 2);
    }
  } else if (type == WeightType::kQ6_K) {
    for (Word* pair = units + 32; pair < units + 48; pair += 2) exchange(pair[0], pair[1], pairs, 2);
  }
}

// Takes one block of one row back out, byte for byte as it stood in the file.
inline void read_block(const WeightTypeInfo& info, const uint8_t* panel, int64_t blocks, int64_t block, int lane,
                       uint8_t* out) {
  const uint8_t* from = panel + units_position(info, blocks, block) + lane * info.unit_bytes;
  uint32_t units[kMostUnits];  // of 4 bytes; those of 2 have no upper bits and stand alone
  for (int u = 0; u < info.unit_count; ++u) {
    std::memcpy(units + u, from + unit_place(info.type, u) * kPanelRows * info.unit_bytes,
                static_cast<size_t>(info.unit_bytes));
  }
  regroup_upper_bits(info.type, units, true);
  std::memcpy(out + info.unit_offset, units, static_cast<size_t>(info.unit_count * info.unit_bytes));
  if (info.scale_offset >= 0) {
    std::memcpy(out + info.scale_offset, panel + scales_position(info, block) + lane * 2, 2);
  }
}

}  // namespace tkt
