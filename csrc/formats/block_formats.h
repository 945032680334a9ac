// The types of weights that have kernels, the panel layout that they are packed into, and the quantized activations
// that they are multiplied with. What the bits of a block mean is in <type>.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tkt {

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
// `unit_bytes`; a unit of the 16 rows stands together, lane = row. So 4 consecutive int8 (or 8 nibbles) of 16 rows fill
// one 512-bit register.
//
// Bytes stand in the order in which a product of one token first reads them: it is bound by memory, and then nothing is
// faster than what the hardware's prefetchers make of a single ascending stream (benchmarks/JOURNAL.md, J10).
// Therefore:
// - f16 scales of blocks whose size is no multiple of 4, 32 bytes of a panel, lead two blocks at a time, so that units
//   stay on 64-byte lines: scales of blocks 0 and 1, units of block 0, units of block 1, scales of blocks 2 and 3, ...
//   A last block without a second is led by its own scales alone. Scales of one byte lead four blocks likewise.
// - Lower and upper bits of 3-, 5- and 6-bit types, which stand apart in the file, come together in sets of units, one
//   set after the other. A set holds vectors of 4 columns of all rows: 8 in 5 units in Q5_0, Q5_1 and Q5_K, 4 in 3
//   units in Q6_K, 8 in 3 units in Q3_K. Byte by byte, from the lowest bit (v2:0-2 is bits 0 to 2 of vector 2):
//   Q5_0, Q5_1, Q5_K: unit 0 is v0, v2:0-2; unit 1 v1, v7:3, v2:3-4; unit 2 v3, v5:0-2; unit 3 v4, v7:4, v5:3-4; unit 4
//   v6, v7:0-2.
//   Q6_K: unit 0 is v0, v3:0-1; unit 1 v1, v3:2-3; unit 2 v2, v3:4-5.
//   Q3_K: unit 0 is v0, v1, v6:0-1; unit 1 v2, v3, v7:0-1; unit 2 v4, v5, v6:2, v7:2.
//   To take 8 vectors of 5 bits apart are 23 operations, 4 of 6 bits 11, 8 of 3 bits 19; with nibbles and upper bits
//   beside them 35, 17 and 37.
// - Vectors 2 i and 2 i + 1 are group i of 4 columns of two blocks of 32: of Q5_0 and Q5_1, the first and second 16
//   columns of one block; of Q3_K and Q5_K, blocks 2 c and 2 c + 1, a chunk c of two sets; of Q6_K, a block and the one
//   64 columns behind it, a chunk of four sets. Chunks follow each other as their columns do.
// - Bits that the file has together change places for vectors of such chunks: nibbles of IQ4_XS, so that it is as Q4_K;
//   pairs of bits of Q2_K, of which a unit has vectors 0 to 3, two groups, from the lowest bits.

constexpr int kPanelRows = 16;

// Every type with kernels, once: what has an entry a type is made from this list, so that entry i belongs to type i.
#define TKT_FLOAT_TYPES(X) X(F32) X(F16) X(BF16)
#define TKT_UNIT_TYPES(X) \
  X(Q4_0) X(Q5_0) X(Q8_0) X(Q4_K) X(Q5_K) X(Q6_K) X(MXFP4) X(IQ4_NL) X(IQ4_XS) X(Q4_1) X(Q5_1) X(Q3_K) X(Q2_K)
// Those whose blocks stand whole in a panel, the 16 rows' one after the other (kernels/words_rows-inl.h).
#define TKT_ROW_TYPES(X) X(IQ3_S) X(IQ3_XXS) X(IQ2_S) X(IQ2_XS) X(IQ2_XXS) X(IQ1_S) X(IQ1_M) X(TQ1_0) X(TQ2_0) X(NVFP4)
#define TKT_QUANTIZED_TYPES(X) TKT_UNIT_TYPES(X) TKT_ROW_TYPES(X)
#define TKT_WEIGHT_TYPES(X) TKT_FLOAT_TYPES(X) TKT_QUANTIZED_TYPES(X)

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
  int unit_bytes;      // 2 or 4, or the whole block
  int unit_count;      // per block
  int scale_offset;    // where the scale stands in a block that has units beside it; -1: it is part of a unit
  ActivationFormat activation;

  constexpr int scale_bytes() const { return block_bytes - unit_bytes * unit_count; }
  // Blocks whose scales stand together: as many as make a line of 64 bytes.
  constexpr int blocks_together() const { return scale_bytes() == 0 ? 1 : 4 / scale_bytes(); }
  constexpr bool whole_blocks() const { return unit_count == 1 && block_elements > 1; }
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
    {WeightType::kMXFP4, "MXFP4", 39, 32, 17, 1, 4, 4, 0, ActivationFormat::kQ8},
    {WeightType::kIQ4_NL, "IQ4_NL", 20, 32, 18, 2, 4, 4, 0, ActivationFormat::kQ8},
    {WeightType::kIQ4_XS, "IQ4_XS", 23, 256, 136, 0, 4, 34, -1, ActivationFormat::kQ8},
    {WeightType::kQ4_1, "Q4_1", 3, 32, 20, 0, 4, 5, -1, ActivationFormat::kQ8},
    {WeightType::kQ5_1, "Q5_1", 7, 32, 24, 0, 4, 6, -1, ActivationFormat::kQ8},
    {WeightType::kQ3_K, "Q3_K", 11, 256, 110, 0, 4, 27, 108, ActivationFormat::kQ8},
    {WeightType::kQ2_K, "Q2_K", 10, 256, 84, 0, 4, 21, -1, ActivationFormat::kQ8},
    {WeightType::kIQ3_S, "IQ3_S", 21, 256, 110, 0, 110, 1, -1, ActivationFormat::kQ8},
    {WeightType::kIQ3_XXS, "IQ3_XXS", 18, 256, 98, 0, 98, 1, -1, ActivationFormat::kQ8},
    {WeightType::kIQ2_S, "IQ2_S", 22, 256, 82, 0, 82, 1, -1, ActivationFormat::kQ8},
    {WeightType::kIQ2_XS, "IQ2_XS", 17, 256, 74, 0, 74, 1, -1, ActivationFormat::kQ8},
    {WeightType::kIQ2_XXS, "IQ2_XXS", 16, 256, 66, 0, 66, 1, -1, ActivationFormat::kQ8},
    {WeightType::kIQ1_S, "IQ1_S", 19, 256, 50, 0, 50, 1, -1, ActivationFormat::kQ8},
    {WeightType::kIQ1_M, "IQ1_M", 29, 256, 56, 0, 56, 1, -1, ActivationFormat::kQ8},
    {WeightType::kTQ1_0, "TQ1_0", 34, 256, 54, 0, 54, 1, -1, ActivationFormat::kQ8},
    {WeightType::kTQ2_0, "TQ2_0", 35, 256, 66, 0, 66, 1, -1, ActivationFormat::kQ8},
    {WeightType::kNVFP4, "NVFP4", 40, 64, 36, 0, 36, 1, -1, ActivationFormat::kQ8},
};

constexpr const WeightTypeInfo& info_of(WeightType type) { return kWeightTypeInfos[static_cast<int>(type)]; }

constexpr bool has_minima(WeightType type) {
  return type == WeightType::kQ4_K || type == WeightType::kQ5_K || type == WeightType::kQ2_K ||
         type == WeightType::kQ4_1 || type == WeightType::kQ5_1;
}

// Units of a set, whose bits a panel distributes anew (panel_layout.h, `spread_sets`).
constexpr int set_units(WeightType type) {
  return type == WeightType::kQ6_K || type == WeightType::kQ3_K                                ? 3
         : type == WeightType::kQ5_K || type == WeightType::kQ5_0 || type == WeightType::kQ5_1 ? 5
                                                                                               : 1;
}

// Those before the first set: scales.
constexpr int head_units(WeightType type) {
  return type == WeightType::kQ5_K || type == WeightType::kQ6_K ? 4
         : type == WeightType::kQ3_K                            ? 3
         : type == WeightType::kQ5_1                            ? 1
                                                                : 0;
}

// Where unit `unit` of a block of the file stands in a block of a panel.
constexpr int unit_place(WeightType type, int unit) {
  if (type == WeightType::kQ5_K && unit >= 4) {
    constexpr int kFirst = head_units(WeightType::kQ5_K), kOfChunk = 10;
    if (unit < 12) {  // qh, regrouped: 2 fours, a unit of each chunk in a four
      const int four = (unit - 4) / 4, chunk = (unit - 4) % 4;
      return kFirst + chunk * kOfChunk + four * 5;
    }
    const int chunk = (unit - 12) / 8, group = (unit - 12) % 8;
    return kFirst + chunk * kOfChunk + 1 + group + group / 4;
  }
  if (type == WeightType::kQ6_K) {
    constexpr int kFirst = head_units(WeightType::kQ6_K), kOfChunk = 12;
    if (unit >= 48) return unit - 48;  // scales
    if (unit >= 32) {                  // qh, regrouped: per half 4 pairs, a unit of each of two chunks in a pair
      const int half = (unit - 32) / 8, pair = unit % 8 / 2;
      return kFirst + (half * 2 + unit % 2) * kOfChunk + pair * 3;
    }
    const int chunk = unit / 8, group = unit % 8;
    return kFirst + chunk * kOfChunk + 1 + group + group / 2;
  }
  if (type == WeightType::kQ2_K) {
    if (unit == 20) return 0;         // d, dmin
    if (unit < 4) return 1 + unit;    // scales and minima
    const int pair = (unit - 4) / 2;  // qs, regrouped: per 128 weights 4 pairs, a unit of each of two chunks in a pair
    return 5 + (pair / 4 * 2 + unit % 2) * 4 + pair % 4;
  }
  if (type == WeightType::kQ3_K) {
    constexpr int kFirst = head_units(WeightType::kQ3_K);
    if (unit >= 24) return unit - 24;  // scales
    if (unit < 8) {                    // hmask, regrouped: per half of 16 columns a unit of each chunk
      const int columns = unit / 4, chunk = unit % 4;
      return kFirst + (chunk * 2 + columns) * 3;
    }
    // qs, regrouped: per 128 weights and half of 16 columns, two units of each of two chunks
    const int columns = (unit - 8) / 4 % 2, chunk = (unit - 8) / 8 * 2 + unit % 4 / 2;
    return kFirst + (chunk * 2 + columns) * 3 + 1 + unit % 2;
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
    if (static_cast<int>(info.type) != i) return false;
    if (info.scale_bytes() < 0 || info.scale_bytes() > 2 || (info.scale_bytes() > 0) != (info.scale_offset >= 0))
      return false;
    uint64_t places = 0;
    for (int unit = 0; unit < info.unit_count; ++unit) places |= uint64_t{1} << unit_place(info.type, unit);
    if (places != ~uint64_t{0} >> (64 - info.unit_count)) return false;
  }
  return true;
}
static_assert(table_is_consistent(), "a panel holds every byte of a block once");

}  // namespace tkt
