// Blocks of a panel that stand whole in it (block_formats.h) as bytes and scales, for kernels that multiply any such
// type.
#pragma once

#include <cstdint>

#include "formats/block_formats.h"

namespace tkt {

// Where the weights of 16 rows go. Those of 4 columns of all rows stand together, lane = row, `group_bytes` from those
// of the next 4; scales are of 16 columns, and of all rows too, `scale_floats` from those of the next 16.
struct UnpackedRowsTarget {
  uint8_t* weights;
  int64_t group_bytes;
  uint32_t kept_bits;  // of each 4 weights
  uint32_t flipped_bits;
  float* scales;
  int64_t scale_floats;
  float* d;
};

// `blocks`: 16 blocks of `type`, one of each row.
void unpack_rows(WeightType type, const uint8_t* blocks, const UnpackedRowsTarget& to);

}  // namespace tkt
