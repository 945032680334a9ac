// GGUF weight blocks (bit layouts as defined by ggml), the panel layout they are packed into, and the quantized
// activations they are multiplied with. Every fact about a type stands here once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tkt {

// ---- GGUF blocks: little-endian, rows of blocks without gaps. f16 scales are kept as raw bits. ----------------------

// 32 weights, 4.5 bits each: w = d * (q - 8). qs[i]: low nibble = weight i, high nibble = weight i + 16.
struct BlockQ4_0 {
  uint16_t d;
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ4_0) == 18, "ggml block size");

// 32 weights, 5.5 bits each: w = d * (q - 16). Bit i of qh is bit 4 of weight i; qs as in Q4_0.
struct BlockQ5_0 {
  uint16_t d;
  uint8_t qh[4];
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ5_0) == 22, "ggml block size");

// 32 weights, 8.5 bits each: w = d * q.
struct BlockQ8_0 {
  uint16_t d;
  int8_t qs[32];
};
static_assert(sizeof(BlockQ8_0) == 34, "ggml block size");

// 256 weights in 8 sub-blocks of 32, 4.5 bits each: w = d * sc[j] * q - dmin * m[j].
// scales: 8 pairs (sc, m) of 6 bits: bytes 0-3 hold sc[0..3], bytes 4-7 m[0..3] in their low 6 bits; bytes 8-11 hold the
// low 4 bits of sc[4..7] and m[4..7]; their upper 2 bits sit in the top of bytes 0-3 and 4-7.
// qs: 4 chunks of 32 bytes; chunk c: low nibbles = sub-block 2c, high nibbles = sub-block 2c + 1.
struct BlockQ4_K {
  uint16_t d;
  uint16_t dmin;
  uint8_t scales[12];
  uint8_t qs[128];
};
static_assert(sizeof(BlockQ4_K) == 144, "ggml block size");

// As Q4_K with a fifth bit, 5.5 bits each: bit j of qh[i] is bit 4 of weight i of sub-block j.
struct BlockQ5_K {
  uint16_t d;
  uint16_t dmin;
  uint8_t scales[12];
  uint8_t qh[32];
  uint8_t qs[128];
};
static_assert(sizeof(BlockQ5_K) == 176, "ggml block size");

// 256 weights in 16 sub-blocks of 16, 6.5625 bits each: w = d * scales[j] * (q - 32).
// Per half of 128 weights: ql[64] holds the low 4 bits (weights l and l + 64 share byte l), qh[32] the upper 2 bits of
// weights l, l + 32, l + 64, l + 96 in bits 0-1, 2-3, 4-5, 6-7 of byte l.
struct BlockQ6_K {
  uint8_t ql[128];
  uint8_t qh[64];
  int8_t scales[16];
  uint16_t d;
};
static_assert(sizeof(BlockQ6_K) == 210, "ggml block size");

// ---- Activations, quantized once per token ------------------------------------------------------------------------

// 32 values: x = d * q, |q| <= 127. One scale per 32 for every weight type: ggml takes one per 256 for K-quants, which
// doubles the variance of the rounding error (the largest of 256 normal values is 1.4 times that of 32) and lets one
// outlier coarsen 255 neighbours; it would save about one operation in twelve.
struct ActivationQ8 {
  int8_t q[32];
  float d;
  float d_sum;           // d * sum of q: what a weight's minimum is multiplied with
  int32_t neg_sum;       // -sum of q: takes back the offset of unsigned quants
  int32_t neg_sum16[2];  // likewise over 16, for Q6_K's sub-blocks
};
static_assert(sizeof(ActivationQ8) == 52, "no padding");

enum class ActivationFormat { kF32, kQ8 };
constexpr int kActivationFormats = 2;

// Bytes of one token's activations of `cols` values; a multiple of 64 so that rows start on cache lines.
inline int64_t activation_row_bytes(ActivationFormat format, int64_t cols) {
  const int64_t bytes = format == ActivationFormat::kF32 ? cols * static_cast<int64_t>(sizeof(float))
                                                         : cols / 32 * static_cast<int64_t>(sizeof(ActivationQ8));
  return (bytes + 63) / 64 * 64;
}

// ---- Types and their panel layout ---------------------------------------------------------------------------------
//
// A panel holds 16 rows, k-major, in exactly 16 times a row's bytes. A block is cut into `unit_count` units of
// `unit_bytes`; a unit of the 16 rows stands together, lane = row. So 4 consecutive int8 (or 8 nibbles) of 16 rows fill one
// 512-bit register.
//
// Bytes stand in the order in which a product of one token first reads them: it is bound by memory, and then nothing is
// faster than what the hardware's prefetchers make of a single ascending stream (benchmarks/JOURNAL.md, J10).
// Therefore:
// - f16 scales of blocks whose size is no multiple of 4, 32 bytes of a panel, lead two blocks at a time, so that units
//   stay on 64-byte lines: scales of blocks 0 and 1, units of block 0, units of block 1, scales of blocks 2 and 3, ... A
//   last block without a second is led by its own scales alone.
// - Lower and upper bits of 5- and 6-bit types, which stand apart in the file, come together in sets of units, one set after
//   the other. A set holds vectors of 4 columns of all rows: 8 in 5 units in Q5_0 and Q5_K, 4 in 3 units in Q6_K. Byte by
//   byte, from the lowest bit (v2:0-2 is bits 0 to 2 of vector 2):
//   Q5_0, Q5_K: unit 0 is v0, v2:0-2; unit 1 v1, v7:3, v2:3-4; unit 2 v3, v5:0-2; unit 3 v4, v7:4, v5:3-4; unit 4 v6,
//   v7:0-2.
//   Q6_K: unit 0 is v0, v3:0-1; unit 1 v1, v3:2-3; unit 2 v2, v3:4-5.
//   To take 8 vectors of 5 bits apart are 23 operations, 4 of 6 bits 11; with nibbles and upper bits beside them 35 and 17.
// - Vectors 2 i and 2 i + 1 are group i of 4 columns of two blocks of 32: of Q5_0, the first and second 16 columns of one
//   block; of Q5_K, blocks 2 c and 2 c + 1, a chunk c of two sets; of Q6_K, a block and the one 64 columns behind it, a chunk
//   of four sets. Chunks follow each other as their columns do.

constexpr int kPanelRows = 16;

// Every type with kernels, once: what has an entry a type is made from this list, so that entry i belongs to type i.
#define TKT_WEIGHT_TYPES(X) X(F32) X(F16) X(BF16) X(Q4_0) X(Q5_0) X(Q8_0) X(Q4_K) X(Q5_K) X(Q6_K)

#define TKT_ENUMERATOR(name) k##name,
enum class WeightType : int { TKT_WEIGHT_TYPES(TKT_ENUMERATOR) };
#undef TKT_ENUMERATOR
#define TKT_ONE(name) +1
constexpr int kWeightTypes = TKT_WEIGHT_TYPES(TKT_ONE);
#undef TKT_ONE

struct WeightTypeInfo {
  WeightType type;
  const char* name;    // as ggml spells it
  int ggml_type;       // number in a GGUF tensor table
  int block_elements;  // columns per block
  int block_bytes;     // bytes per block of one row
  int unit_offset;     // where the units start in a block
  int unit_bytes;      // 2 or 4
  int unit_count;      // per block
  int scale_offset;    // where the f16 scale stands in a block that has units beside it; -1: it is part of a unit
  ActivationFormat activation;
};

constexpr WeightTypeInfo kWeightTypeInfos[kWeightTypes] = {
    {WeightType::kF32, "F32", 0, 1, 4, 0, 4, 1, -1, ActivationFormat::kF32},
    {WeightType::kF16, "F16", 1, 1, 2, 0, 2, 1, -1, ActivationFormat::kF32},
    {WeightType::kBF16, "BF16", 30, 1, 2, 0, 2, 1, -1, ActivationFormat::kF32},
    {WeightType::kQ4_0, "Q4_0", 2, 32, 18, 2, 4, 4, 0, ActivationFormat::kQ8},
    {WeightType::kQ5_0, "Q5_0", 6, 32, 22, 2, 4, 5, 0, ActivationFormat::kQ8},
    {WeightType::kQ8_0, "Q8_0", 8, 32, 34, 2, 4, 8, 0, ActivationFormat::kQ8},
    {WeightType::kQ4_K, "Q4_K", 12, 256, 144, 0, 4, 36, -1, ActivationFormat::kQ8},
    {WeightType::kQ5_K, "Q5_K", 13, 256, 176, 0, 4, 44, -1, ActivationFormat::kQ8},
    {WeightType::kQ6_K, "Q6_K", 14, 256, 210, 0, 4, 52, 208, ActivationFormat::kQ8},
};

constexpr const WeightTypeInfo& info_of(WeightType type) { return kWeightTypeInfos[static_cast<int>(type)]; }

// Units of a set, whose bits a panel distributes anew (panel_layout.h, `spread_sets`).
constexpr int set_units(WeightType type) {
  return type == WeightType::kQ6_K ? 3 : type == WeightType::kQ5_K || type == WeightType::kQ5_0 ? 5 : 1;
}

// Where unit `unit` of a block of the file stands in a block of a panel.
constexpr int unit_place(WeightType type, int unit) {
  if (type == WeightType::kQ5_K && unit >= 4) {
    constexpr int kFirst = 4, kOfChunk = 10;  // after d, dmin and scales
    if (unit < 12) {                          // qh, regrouped: 2 fours, a unit of each chunk in a four
      const int four = (unit - 4) / 4, chunk = (unit - 4) % 4;
      return kFirst + chunk * kOfChunk + four * 5;
    }
    const int chunk = (unit - 12) / 8, group = (unit - 12) % 8;
    return kFirst + chunk * kOfChunk + 1 + group + group / 4;
  }
  if (type == WeightType::kQ6_K) {
    constexpr int kFirst = 4, kOfChunk = 12;  // after scales
    if (unit >= 48) return unit - 48;         // scales
    if (unit >= 32) {                         // qh, regrouped: per half 4 pairs, a unit of each of two chunks in a pair
      const int half = (unit - 32) / 8, pair = unit % 8 / 2;
      return kFirst + (half * 2 + unit % 2) * kOfChunk + pair * 3;
    }
    const int chunk = unit / 8, group = unit % 8;
    return kFirst + chunk * kOfChunk + 1 + group + group / 2;
  }
  return unit;
}

// nullptr where there is no kernel for that number.
inline const WeightTypeInfo* find_ggml_type(int ggml_type) {
  for (const WeightTypeInfo& info : kWeightTypeInfos) {
    if (info.ggml_type == ggml_type) return &info;
  }
  return nullptr;
}

constexpr bool table_is_consistent() {
  for (int i = 0; i < kWeightTypes; ++i) {
    const WeightTypeInfo& info = kWeightTypeInfos[i];
    const int scale_bytes = info.scale_offset < 0 ? 0 : 2;
    if (static_cast<int>(info.type) != i) return false;
    if (info.unit_bytes * info.unit_count + scale_bytes != info.block_bytes) return false;
    uint64_t places = 0;
    for (int unit = 0; unit < info.unit_count; ++unit) places |= uint64_t{1} << unit_place(info.type, unit);
    if (places != ~uint64_t{0} >> (64 - info.unit_count)) return false;
  }
  return true;
}
static_assert(table_is_consistent(), "a panel holds every byte of a block once");

}  // namespace tkt
