// Q5_K (formats/block_formats.h).

#include "kernels/six_bit_scales-inl.h"

struct Q5_KWords : SixBitScaleWords {
  static constexpr int kWords = 44;
  static constexpr int kNarrowGroups = 4;
  static constexpr int kSetWords = 5;
  static constexpr int kSetGroups = 4;
  template <int vector>
  static V::I weights(const uint8_t* set) {
    return five_bits<vector>(set);
  }
};

#define TKT_TYPES_OF_FILE(X) X(Q5_K)
