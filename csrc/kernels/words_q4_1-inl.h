// Q4_1 (formats/block_formats.h).

#include "kernels/scale_and_minimum-inl.h"

struct Q4_1Words : ScaleAndMinimumWords {
  static constexpr int kWords = 5;
  static constexpr int kNarrowGroups = 8;  // as Q4_0
  static constexpr int kUnpackTokensOf16Registers = 12;
  template <int position>
  static V::I weights(const uint8_t* words) {
    return four_bits<position % 2>(words + (1 + position / 2) * 64);
  }
};

#define TKT_TYPES_OF_FILE(X) X(Q4_1)
