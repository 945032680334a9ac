#include "formats/row_decoder.h"

#include <cstring>

#include "formats/f16.h"

namespace tkt {
namespace {

void one_scale(DecodedBlock& out, uint16_t d) {
  out.sub_blocks = 1;
  out.scale[0] = 1;
  out.min[0] = 0;
  out.d = float_from_f16(d);
  out.dmin = 0.0f;
}

DecodedBlock decode(const BlockQ4_0& block) {
  DecodedBlock out;
  one_scale(out, block.d);
  for (int i = 0; i < 16; ++i) {
    out.q[i] = static_cast<int8_t>((block.qs[i] & 15) - 8);
    out.q[i + 16] = static_cast<int8_t>((block.qs[i] >> 4) - 8);
  }
  return out;
}

DecodedBlock decode(const BlockQ5_0& block) {
  DecodedBlock out;
  one_scale(out, block.d);
  for (int i = 0; i < 32; ++i) {
    const int low = i < 16 ? block.qs[i] & 15 : block.qs[i - 16] >> 4;
    const int high = (block.qh[i / 8] >> (i % 8)) & 1;
    out.q[i] = static_cast<int8_t>((low | high << 4) - 16);
  }
  return out;
}

DecodedBlock decode(const BlockQ8_0& block) {
  DecodedBlock out;
  one_scale(out, block.d);
  std::memcpy(out.q, block.qs, 32);
  return out;
}

void decode_six_bit_scales(const uint8_t* scales, DecodedBlock& out) {
  out.sub_blocks = 8;
  for (int j = 0; j < 4; ++j) {
    out.scale[j] = scales[j] & 63;
    out.min[j] = scales[j + 4] & 63;
    out.scale[j + 4] = (scales[j + 8] & 15) | (scales[j] >> 6) << 4;
    out.min[j + 4] = (scales[j + 8] >> 4) | (scales[j + 4] >> 6) << 4;
  }
}

int nibble(const uint8_t* qs, int sub_block, int i) {
  const uint8_t byte = qs[sub_block / 2 * 32 + i];
  return sub_block % 2 == 0 ? byte & 15 : byte >> 4;
}

DecodedBlock decode(const BlockQ4_K& block) {
  DecodedBlock out;
  decode_six_bit_scales(block.scales, out);
  out.d = float_from_f16(block.d);
  out.dmin = float_from_f16(block.dmin);
  for (int i = 0; i < 256; ++i) out.q[i] = static_cast<int8_t>(nibble(block.qs, i / 32, i % 32));
  return out;
}

DecodedBlock decode(const BlockQ5_K& block) {
  DecodedBlock out;
  decode_six_bit_scales(block.scales, out);
  out.d = float_from_f16(block.d);
  out.dmin = float_from_f16(block.dmin);
  for (int i = 0; i < 256; ++i) {
    const int high = (block.qh[i % 32] >> (i / 32)) & 1;
    out.q[i] = static_cast<int8_t>(nibble(block.qs, i / 32, i % 32) | high << 4);
  }
  return out;
}

DecodedBlock decode(const BlockQ6_K& block) {
  DecodedBlock out;
  out.sub_blocks = 16;
  out.d = float_from_f16(block.d);
  out.dmin = 0.0f;
  for (int j = 0; j < 16; ++j) {
    out.scale[j] = block.scales[j];
    out.min[j] = 0;
  }
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128;
    const int within = i % 128;
    const uint8_t low_byte = block.ql[half * 64 + within % 64];
    const int low = within < 64 ? low_byte & 15 : low_byte >> 4;
    const int high = (block.qh[half * 32 + within % 32] >> (within / 32 * 2)) & 3;
    out.q[i] = static_cast<int8_t>((low | high << 4) - 32);
  }
  return out;
}

template <class Block>
DecodedBlock decode_bytes(const uint8_t* bytes) {
  Block block;
  std::memcpy(&block, bytes, sizeof(block));
  return decode(block);
}

}  // namespace

DecodedBlock decode_block(WeightType type, const uint8_t* block) {
  switch (type) {
    case WeightType::kQ4_0:
      return decode_bytes<BlockQ4_0>(block);
    case WeightType::kQ5_0:
      return decode_bytes<BlockQ5_0>(block);
    case WeightType::kQ8_0:
      return decode_bytes<BlockQ8_0>(block);
    case WeightType::kQ4_K:
      return decode_bytes<BlockQ4_K>(block);
    case WeightType::kQ5_K:
      return decode_bytes<BlockQ5_K>(block);
    case WeightType::kQ6_K:
      return decode_bytes<BlockQ6_K>(block);
    case WeightType::kF32:
    case WeightType::kF16:
    case WeightType::kBF16:
      break;
  }
  return DecodedBlock{};
}

float decode_float(WeightType type, const uint8_t* element) {
  if (type == WeightType::kF32) {
    float value;
    std::memcpy(&value, element, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, element, sizeof(bits));
  return type == WeightType::kF16 ? float_from_f16(bits) : float_from_bf16(bits);
}

void dequantize_row(WeightType type, const uint8_t* row, int64_t cols, float* out) {
  const WeightTypeInfo& info = info_of(type);
  for (int64_t b = 0; b < cols / info.block_elements; ++b) {
    const uint8_t* block = row + b * info.block_bytes;
    if (info.activation == ActivationFormat::kF32) {
      out[b] = decode_float(type, block);
      continue;
    }
    const DecodedBlock decoded = decode_block(type, block);
    const int sub_columns = info.block_elements / decoded.sub_blocks;
    for (int i = 0; i < info.block_elements; ++i) {
      const int j = i / sub_columns;
      // Exact up to the subtraction: 11 + 6 + 6 significant bits.
      const float scaled = decoded.d * static_cast<float>(decoded.scale[j]) * static_cast<float>(decoded.q[i]);
      out[b * info.block_elements + i] = scaled - decoded.dmin * static_cast<float>(decoded.min[j]);
    }
  }
}

}  // namespace tkt
