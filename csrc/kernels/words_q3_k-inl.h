// Q3_K (formats/block_formats.h).

#include "kernels/signed_scales-inl.h"

struct Q3_KWords {
  static constexpr int kColumns = 256;
  static constexpr bool kUnpacks = true;
  static constexpr int kScaleBytes = 32;
  static constexpr int kHeadWords = 3;
  static constexpr int kWords = 27;
  static constexpr int kNarrowGroups = 4;  // 4 * 2 * 7 * 127 = 7,112
  static constexpr int kSubColumns = 16;
  static constexpr int kSetWords = 3;
  static constexpr int kSetGroups = 4;
  static constexpr int kOffsetLog2 = 2;
  static constexpr int kPerLineTokens = 2;
  static constexpr int kUnpackTokensOf16Registers = 3;
  struct Scales : SignedScales<16> {
    void read(const uint8_t* words, const uint8_t* leading) {
      d = V::load_f16(leading);
      const V::I first = V::load_i(words);
      const V::I second = V::load_i(words + 64);
      const V::I upper = V::load_i(words + 128);
      bytes[0] = six_bits_of(bits_of<0>(first, 0x0f), bits_of<0>(upper, 0x03));
      bytes[1] = six_bits_of(bits_of<0>(second, 0x0f), bits_of<2>(upper, 0x03));
      bytes[2] = six_bits_of(bits_of<4>(first, 0x0f), bits_of<4>(upper, 0x03));
      bytes[3] = six_bits_of(bits_of<4>(second, 0x0f), bits_of<6>(upper, 0x03));
    }
    static V::I six_bits_of(V::I low, V::I high) { return minus_32(V::or_i(low, V::template shift_left<4>(high))); }
  };
  static constexpr int kRun = 1;
  static constexpr int block_of(int chunk, int nibble) { return 2 * chunk + nibble; }
  template <int vector>
  static V::I weights(const uint8_t* set) {
    return three_bits<vector>(set);
  }
};

#define TKT_TYPES_OF_FILE(X) X(Q3_K)
