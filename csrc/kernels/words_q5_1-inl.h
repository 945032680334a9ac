// Q5_1 (formats/block_formats.h).

#include "kernels/scale_and_minimum-inl.h"

struct Q5_1Words : ScaleAndMinimumWords {
  static constexpr int kWords = 6;
  static constexpr int kNarrowGroups = 4;  // as Q5_0
  static constexpr int kUnpackTokensOf16Registers = 7;
  template <int position>
  static V::I weights(const uint8_t* words) {
    return five_bits<position>(words + 64);
  }
};

#define TKT_TYPES_OF_FILE(X) X(Q5_1)
