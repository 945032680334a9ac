// Q6_K (formats/block_formats.h).

#include "kernels/signed_scales-inl.h"

struct Q6_KWords {
  static constexpr int kColumns = 256;
  static constexpr bool kUnpacks = true;
  static constexpr int kWords = 52;
  static constexpr int kScaleBytes = 32;
  static constexpr int kHeadWords = 4;
  static constexpr int kNarrowGroups = 2;  // 2 * 2 * 63 * 127 = 32,004
  static constexpr int kSubColumns = 16;
  static constexpr int kSetWords = 3;
  static constexpr int kSetGroups = 2;
  static constexpr int kOffsetLog2 = 5;
  static constexpr int kPerLineTokens = 2;
  static constexpr int kUnpackTokensOf16Registers = 3;
  struct Scales : SignedScales<16> {
    void read(const uint8_t* words, const uint8_t* leading) {
      d = V::load_f16(leading);
      TKT_UNROLL for (int i = 0; i < 4; ++i) bytes[i] = V::load_i(words + i * 64);
    }
  };
  static constexpr int kRun = 2;
  static constexpr int block_of(int chunk, int nibble) { return chunk / 2 * 4 + chunk % 2 + 2 * nibble; }
  template <int vector>
  static V::I weights(const uint8_t* set) {
    return six_bits<vector>(set);
  }
};

#define TKT_TYPES_OF_FILE(X) X(Q6_K)
