#include "formats/unpack_rows.h"

#include <cstring>

#include "formats/row_decoder.h"

namespace tkt {

void unpack_rows(WeightType type, const uint8_t* blocks, const UnpackedRowsTarget& to) {
  const WeightTypeInfo& info = info_of(type);
  for (int lane = 0; lane < kPanelRows; ++lane) {
    DecodedBlock block;
    decode_block(type, blocks + lane * info.block_bytes, block);
    for (int group = 0; group < info.block_elements / 4; ++group) {
      uint32_t four;
      std::memcpy(&four, block.q + group * 4, 4);
      four = (four & to.kept_bits) ^ to.flipped_bits;
      std::memcpy(to.weights + group * to.group_bytes + lane * 4, &four, 4);
    }
    for (int i = 0; i < info.block_elements / 16; ++i) {
      to.scales[i * to.scale_floats + lane] = block.scale[i * 16 / block.sub_columns];
    }
    to.d[lane] = block.d;
  }
}

}  // namespace tkt
