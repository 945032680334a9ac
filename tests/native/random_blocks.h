// Matrices as a GGUF file holds them, with every bit pattern in quants and sub-block scales.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "formats/block_formats.h"
#include "formats/f16.h"

namespace tkt::test {

// Where the f16 scales of a block of a quantized type stand, said here a second time to find a slip in the layouts.
inline std::vector<int> scale_offsets(WeightType type) {
  switch (type) {
    case WeightType::kQ4_1:
    case WeightType::kQ5_1:
    case WeightType::kQ4_K:
    case WeightType::kQ5_K:
      return {0, 2};
    case WeightType::kQ2_K:
      return {80, 82};
    case WeightType::kQ3_K:
      return {108};
    case WeightType::kQ6_K:
      return {208};
    case WeightType::kTQ1_0:
      return {52};
    case WeightType::kTQ2_0:
      return {64};
    case WeightType::kF32:
    case WeightType::kF16:
    case WeightType::kBF16:
    case WeightType::kIQ1_M:
    case WeightType::kMXFP4:
    case WeightType::kNVFP4:
      return {};
    default:
      return {0};
  }
}

inline void set_scales(WeightType type, uint16_t bits, uint8_t* block) {
  for (const int offset : scale_offsets(type)) std::memcpy(block + offset, &bits, sizeof bits);
  if (type != WeightType::kIQ1_M) return;
  for (int i = 0; i < 4; ++i) {  // a nibble in the upper bits of each of 4 words
    uint8_t& upper = block[49 + 2 * i];
    upper = static_cast<uint8_t>((upper & 0x0f) | (bits >> (4 * i) & 15) << 4);
  }
}

// Scales of the others are powers of two and E4M3 numbers, which are finite whatever their bits.
inline bool scales_may_be_no_numbers(WeightType type) {
  return type != WeightType::kMXFP4 && type != WeightType::kNVFP4;
}

inline void set_float(WeightType type, float value, uint8_t* element) {
  const uint16_t half = f16_from_float(value);
  uint32_t whole;
  std::memcpy(&whole, &value, sizeof whole);
  const uint16_t upper = static_cast<uint16_t>(whole >> 16);
  if (type == WeightType::kF32) std::memcpy(element, &whole, sizeof whole);
  if (type == WeightType::kF16) std::memcpy(element, &half, sizeof half);
  if (type == WeightType::kBF16) std::memcpy(element, &upper, sizeof upper);
}

// `count` blocks, one after the other; scales and floats are finite.
inline std::vector<uint8_t> random_blocks(const WeightTypeInfo& info, int64_t count, std::mt19937& random) {
  std::vector<uint8_t> blocks(static_cast<size_t>(count * info.block_bytes));
  for (uint8_t& byte : blocks) byte = static_cast<uint8_t>(random());
  std::uniform_real_distribution<float> scale(-0.02f, 0.02f);
  for (int64_t b = 0; b < count; ++b) {
    uint8_t* block = blocks.data() + b * info.block_bytes;
    set_scales(info.type, f16_from_float(scale(random)), block);
    set_float(info.type, scale(random), block);
    if (info.type == WeightType::kMXFP4) *block = static_cast<uint8_t>(110 + *block % 16);  // products stay finite
  }
  return blocks;
}

inline std::vector<float> random_floats(int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

}  // namespace tkt::test
