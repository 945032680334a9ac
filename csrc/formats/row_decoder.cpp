#include "formats/row_decoder.h"

#include <cstring>

#include "formats/f16.h"
#include "formats/iq1_m.h"
#include "formats/iq1_s.h"
#include "formats/iq2_s.h"
#include "formats/iq2_xs.h"
#include "formats/iq2_xxs.h"
#include "formats/iq3_s.h"
#include "formats/iq3_xxs.h"
#include "formats/iq4_nl.h"
#include "formats/iq4_xs.h"
#include "formats/mxfp4.h"
#include "formats/nvfp4.h"
#include "formats/q2_k.h"
#include "formats/q3_k.h"
#include "formats/q4_0.h"
#include "formats/q4_1.h"
#include "formats/q4_k.h"
#include "formats/q5_0.h"
#include "formats/q5_1.h"
#include "formats/q5_k.h"
#include "formats/q6_k.h"
#include "formats/q8_0.h"
#include "formats/tq1_0.h"
#include "formats/tq2_0.h"

namespace tkt {
namespace {

template <class Block>
void decode_bytes(const uint8_t* bytes, DecodedBlock& out) {
  Block block;
  std::memcpy(&block, bytes, sizeof(block));
  decode(block, out);
}

#define TKT_CHECK_SIZE(name) static_assert(sizeof(Block##name) == info_of(WeightType::k##name).block_bytes);
TKT_QUANTIZED_TYPES(TKT_CHECK_SIZE)

}  // namespace

void decode_block(WeightType type, const uint8_t* block, DecodedBlock& out) {
  switch (type) {
#define TKT_CASE(name)      \
  case WeightType::k##name: \
    return decode_bytes<Block##name>(block, out);
    TKT_QUANTIZED_TYPES(TKT_CASE)
    case WeightType::kF32:
    case WeightType::kF16:
    case WeightType::kBF16:
      break;
  }
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
    DecodedBlock decoded;
    decode_block(type, block, decoded);
    for (int i = 0; i < info.block_elements; ++i) {
      const int j = i / decoded.sub_columns;
      // Exact up to the subtraction: at most 24 significant bits, 11 + 6 + 7 in IQ4_XS.
      const float scaled = decoded.d * decoded.scale[j] * static_cast<float>(decoded.q[i]);
      out[b * info.block_elements + i] = scaled - decoded.dmin * decoded.min[j];
    }
  }
}

}  // namespace tkt
