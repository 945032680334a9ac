// Where the parts of a GGUF block stand in a panel of 16 rows (layout: block_formats.h), and the order of bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "formats/block_formats.h"

namespace tkt {

constexpr int kMostUnits = 52;  // of a block, in Q6_K
constexpr int kMostBlockBytes = 210;

inline int64_t row_bytes(const WeightTypeInfo& info, int64_t cols) {
  return cols / info.block_elements * info.block_bytes;
}

// Where the leading scales of a block stand in a panel, and, in one of `blocks` blocks, its first unit.
inline int64_t scales_position(const WeightTypeInfo& info, int64_t block) {
  const int64_t together = info.blocks_together();
  const int64_t block_bytes = int64_t{info.block_bytes} * kPanelRows;
  return block / together * together * block_bytes + block % together * kPanelRows * info.scale_bytes();
}
inline int64_t units_position(const WeightTypeInfo& info, int64_t blocks, int64_t block) {
  const int64_t block_bytes = int64_t{info.block_bytes} * kPanelRows;
  if (info.scale_offset < 0) return block * block_bytes;
  const int64_t together = info.blocks_together();
  const int64_t first = block / together * together;
  const int64_t scales = (first + together <= blocks ? together : blocks - first) * kPanelRows * info.scale_bytes();
  return first * block_bytes + scales + (block - first) * info.unit_count * kPanelRows * info.unit_bytes;
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

// Bits among a block's units, given in the order of the file: upper ones each to a unit that goes with the lower bits
// of one set alone; or, with `back`, back.
//
// Q5_0, Q5_1: bit 4 g + k to bit 8 k + g: the index turns by two; three turns more are a full circle of five.
// Q5_K: per byte of a unit qh[g], 2 bits for each of 4 chunks. 4 units of 4 chunks become 4 chunks of 4 units: in each
// four the pairs of bits of a byte are transposed. Q6_K: per byte of a unit, 2 bits for each of 4 quarters q; chunks
// are the quarters p and p + 2, so that 2 units of 2 chunks are transposed. IQ4_XS: the nibbles of two blocks, as Q4_K
// has them. Q3_K: hmask as qh of Q5_K; per byte of a unit of qs 2 bits for each of 4 blocks, the upper two of which
// change places with the lower two of the unit two further. Q2_K: qs likewise, with the next unit. These are their own
// inverse.
template <WeightType type, bool back, typename Word>
inline void regroup_bits(Word* units) {
  const Word pairs = in_each_unit<Word>(0x33333333);
  const Word fours = in_each_unit<Word>(0x0f0f0f0f);
  if constexpr (type == WeightType::kQ5_0 || type == WeightType::kQ5_1) {
    Word& upper = units[head_units(type)];
    for (int turn = 0; turn < (back ? 3 : 2); ++turn) upper = even_bits_first(upper);
  } else if constexpr (type == WeightType::kQ5_K || type == WeightType::kQ3_K) {
    constexpr int kFirst = type == WeightType::kQ5_K ? 4 : 0;
    for (Word* four = units + kFirst; four < units + kFirst + 8; four += 4) {
      exchange(four[0], four[2], fours, 4);
      exchange(four[1], four[3], fours, 4);
      exchange(four[0], four[1], pairs, 2);
      exchange(four[2], four[3], pairs, 2);
    }
    if constexpr (type == WeightType::kQ3_K) {
      for (Word* four = units + 8; four < units + 24; four += 4) {
        exchange(four[0], four[2], fours, 4);
        exchange(four[1], four[3], fours, 4);
      }
    }
  } else if constexpr (type == WeightType::kQ6_K) {
    for (Word* pair = units + 32; pair < units + 48; pair += 2) exchange(pair[0], pair[1], pairs, 2);
  } else if constexpr (type == WeightType::kQ2_K) {
    for (Word* pair = units + 4; pair < units + 20; pair += 2) exchange(pair[0], pair[1], fours, 4);
  } else if constexpr (type == WeightType::kIQ4_XS) {
    for (Word* chunk = units + 2; chunk < units + 34; chunk += 8) {
      for (int i = 0; i < 4; ++i) exchange(chunk[i], chunk[4 + i], fours, 4);
    }
  }
}

// Words of 4 bytes, of several rows beside each other: uint32_t, or a vector of uint64_t.
template <typename Word>
inline Word bits_of_bytes(Word x, int shift, uint64_t mask) {
  using Unit = std::conditional_t<sizeof(Word) == 4, uint32_t, uint64_t>;
  return (x >> shift) & static_cast<Unit>(mask * 0x0101010101010101u);
}

// A set of 5-bit types: upper bits, bit upper_bit(v) of each byte that of vector v, and 4 words with vector 2 i in
// their low and 2 i + 1 in their high nibbles become 5 words with one vector each, under parts of the other three; with
// `back`, back.
template <bool back, typename Word, typename UpperBit>
inline void spread_five_bits(Word (&set)[5], UpperBit upper_bit) {
  constexpr auto bits = bits_of_bytes<Word>;
  const auto [a, b, c, d, e] = set;
  Word vectors[8];
  if constexpr (back) {
    vectors[0] = bits(a, 0, 0x1f);
    vectors[1] = bits(b, 0, 0x1f);
    vectors[2] = bits(a, 5, 0x07) | bits(b, 3, 0x18);
    vectors[3] = bits(c, 0, 0x1f);
    vectors[4] = bits(d, 0, 0x1f);
    vectors[5] = bits(c, 5, 0x07) | bits(d, 3, 0x18);
    vectors[6] = bits(e, 0, 0x1f);
    vectors[7] = bits(e, 5, 0x07) | bits(b, 2, 0x08) | bits(d, 1, 0x10);
    set[0] ^= set[0];
    for (int v = 0; v < 8; ++v) set[0] |= bits(vectors[v], 4, 0x01) << upper_bit(v);
    for (int i = 0; i < 4; ++i) set[1 + i] = bits(vectors[2 * i], 0, 0x0f) | bits(vectors[2 * i + 1], 0, 0x0f) << 4;
  } else {
    for (int v = 0; v < 8; ++v) {
      vectors[v] = bits(set[1 + v / 2], v % 2 * 4, 0x0f) | bits(a, upper_bit(v), 0x01) << 4;
    }
    set[0] = vectors[0] | bits(vectors[2], 0, 0x07) << 5;
    set[1] = vectors[1] | bits(vectors[2], 3, 0x03) << 6 | bits(vectors[7], 3, 0x01) << 5;
    set[2] = vectors[3] | bits(vectors[5], 0, 0x07) << 5;
    set[3] = vectors[4] | bits(vectors[5], 3, 0x03) << 6 | bits(vectors[7], 4, 0x01) << 5;
    set[4] = vectors[6] | bits(vectors[7], 0, 0x07) << 5;
  }
}

// A set of Q6_K: 2 upper bits of 4 vectors, from the lowest those of 0, 2, 1, 3, and 2 words of nibbles as above become
// 3 words with one vector each under 2 bits of vector 3; with `back`, back.
template <bool back, typename Word>
inline void spread_six_bits(Word (&set)[3]) {
  constexpr auto bits = bits_of_bytes<Word>;
  const auto [a, b, c] = set;
  if constexpr (back) {
    set[0] = bits(a, 4, 0x03) | bits(c, 2, 0x0c) | bits(b, 0, 0x30) | bits(c, 0, 0xc0);
    set[1] = bits(a, 0, 0x0f) | bits(b, 0, 0x0f) << 4;
    set[2] = bits(c, 0, 0x0f) | bits(a, 2, 0x30) | bits(b, 0, 0xc0);
  } else {
    set[0] = bits(b, 0, 0x0f) | bits(a, 0, 0x03) << 4 | bits(c, 0, 0x30) << 2;
    set[1] = bits(b, 4, 0x0f) | bits(a, 0, 0x30) | bits(c, 0, 0xc0);
    set[2] = bits(c, 0, 0x0f) | bits(a, 0, 0x0c) << 2 | bits(a, 0, 0xc0);
  }
}

// A set of Q3_K: upper bits, bit v of each byte that of vector v, and 2 words of pairs of bits, from the lowest vectors
// 0 1 4 5 and 2 3 6 7, become 3 words with two vectors each under parts of the other two; with `back`, back.
template <bool back, typename Word>
inline void spread_three_bits(Word (&set)[3]) {
  constexpr auto bits = bits_of_bytes<Word>;
  const auto [a, b, c] = set;
  constexpr auto pair_of = [](int v) { return v / 4 * 4 + v % 2 * 2; };
  Word vectors[8];
  if constexpr (back) {
    for (int v = 0; v < 6; ++v) vectors[v] = bits(set[v / 2], v % 2 * 3, 0x07);
    vectors[6] = bits(a, 6, 0x03) | bits(c, 4, 0x04);
    vectors[7] = bits(b, 6, 0x03) | bits(c, 5, 0x04);
    for (Word& word : set) word ^= word;
    for (int v = 0; v < 8; ++v) {
      set[0] |= bits(vectors[v], 2, 0x01) << v;
      set[1 + v / 2 % 2] |= bits(vectors[v], 0, 0x03) << pair_of(v);
    }
  } else {
    for (int v = 0; v < 8; ++v) vectors[v] = bits(v / 2 % 2 ? c : b, pair_of(v), 0x03) | bits(a, v, 0x01) << 2;
    for (int i = 0; i < 3; ++i) set[i] = vectors[2 * i] | vectors[2 * i + 1] << 3;
    set[0] |= bits(vectors[6], 0, 0x03) << 6;
    set[1] |= bits(vectors[7], 0, 0x03) << 6;
    set[2] |= bits(vectors[6], 2, 0x01) << 6 | bits(vectors[7], 2, 0x01) << 7;
  }
}

// The sets of a block whose units stand as in a panel, each with `kLanes` words beside each other.
template <WeightType type, bool back, int kLanes, typename Word>
inline void spread_sets(Word* block) {
  if constexpr (set_units(type) > 1) {
    constexpr int kUnits = set_units(type);
    for (Word* words = block + head_units(type) * kLanes; words < block + info_of(type).unit_count * kLanes;
         words += kUnits * kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        Word set[kUnits];
        for (int u = 0; u < kUnits; ++u) set[u] = words[u * kLanes + lane];
        if constexpr (type == WeightType::kQ6_K) {
          spread_six_bits<back>(set);
        } else if constexpr (type == WeightType::kQ3_K) {
          spread_three_bits<back>(set);
        } else if constexpr (type == WeightType::kQ5_K) {
          spread_five_bits<back>(set, [](int v) { return v; });
        } else {
          spread_five_bits<back>(set, [](int v) { return v / 2 + v % 2 * 4; });
        }
        for (int u = 0; u < kUnits; ++u) words[u * kLanes + lane] = set[u];
      }
    }
  }
}

// Units of one row as they stand in a panel to those of the file.
template <WeightType type>
inline void units_of_file(const uint32_t* placed, uint32_t* units) {
  uint32_t block[kMostUnits];
  std::memcpy(block, placed, info_of(type).unit_count * sizeof(uint32_t));
  spread_sets<type, true, 1>(block);
  for (int u = 0; u < info_of(type).unit_count; ++u) units[u] = block[unit_place(type, u)];
  regroup_bits<type, true>(units);
}

// Takes one block of one row back out, byte for byte as it stood in the file.
inline void read_block(const WeightTypeInfo& info, const uint8_t* panel, int64_t blocks, int64_t block, int lane,
                       uint8_t* out) {
  const uint8_t* from = panel + units_position(info, blocks, block) + lane * info.unit_bytes;
  if (info.whole_blocks()) {
    std::memcpy(out, from, static_cast<size_t>(info.block_bytes));
    return;
  }
  uint32_t placed[kMostUnits];  // of 4 bytes; those of 2 stand alone
  uint32_t units[kMostUnits];
  for (int u = 0; u < info.unit_count; ++u) {
    std::memcpy(placed + u, from + u * kPanelRows * info.unit_bytes, static_cast<size_t>(info.unit_bytes));
  }
  switch (info.type) {
#define TKT_CASE(name)                                 \
  case WeightType::k##name:                            \
    units_of_file<WeightType::k##name>(placed, units); \
    break;
    TKT_UNIT_TYPES(TKT_CASE)
#undef TKT_CASE
    default:
      std::memcpy(units, placed, sizeof units);
  }
  std::memcpy(out + info.unit_offset, units, static_cast<size_t>(info.unit_count * info.unit_bytes));
  if (info.scale_offset >= 0) {
    std::memcpy(out + info.scale_offset, panel + scales_position(info, block) + lane * info.scale_bytes(),
                static_cast<size_t>(info.scale_bytes()));
  }
}

}  // namespace tkt
