// Q4_K (formats/block_formats.h).

#include "kernels/six_bit_scales-inl.h"

struct Q4_KWords : SixBitScaleWords {
  static constexpr int kWords = 36;
  static constexpr int kNarrowGroups = 8;
  static constexpr int kSetWords = 1;
  static constexpr int kSetGroups = 1;
  template <int vector>
  static V::I weights(const uint8_t* set) {
    return four_bits<vector>(set);
  }
};

#define TKT_TYPES_OF_FILE(X) X(Q4_K)
