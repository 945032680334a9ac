// IQ4_XS (formats/block_formats.h).

#include "kernels/signed_scales-inl.h"

// Of sub-blocks 0 2 1 3 and 4 6 5 7: where the masks of even and odd nibbles leave them.
struct IQ4_XSScales : SignedScales<8> {
  void read(const uint8_t* words, const uint8_t*) {
    const V::I head = V::load_i(words);
    d = V::low_f16(head);
    // The 4 bits of upper parts that belong to a byte of lower ones, to that byte.
    V::I upper = V::template shift_right<16>(head);
    upper = V::and_i(V::or_i(upper, V::template shift_left<8>(upper)), V::set_i(0x00ff00ff));
    upper = V::and_i(V::or_i(upper, V::template shift_left<4>(upper)), V::set_i(0x0f0f0f0f));
    const V::I lower = V::load_i(words + 64);
    const V::I even = V::or_i(bits_of<0>(lower, 0x0f), V::template shift_left<4>(bits_of<0>(upper, 0x03)));
    const V::I odd = V::or_i(bits_of<4>(lower, 0x0f), V::template shift_left<2>(bits_of<0>(upper, 0x0c)));
    bytes[0] = minus_32(pair_of(even, odd));
    bytes[1] = minus_32(pair_of(V::template shift_right<16>(even), V::template shift_right<16>(odd)));
  }
  static constexpr int place_of(int j) { return j % 4 == 1 ? j + 1 : j % 4 == 2 ? j - 1 : j; }
  template <int j>
  V::I scale(int half = 0) const {
    return SignedScales<8>::scale<place_of(j)>(half);
  }
  template <int j>
  V::I scale_pair() const {
    return SignedScales<8>::scale_pair<place_of(j)>();
  }
};

struct IQ4_XSWords {
  static constexpr int kColumns = 256;
  static constexpr bool kUnpacks = true;
  static constexpr int kScaleBytes = 0;  // none lead a block
  static constexpr int kHeadWords = 2;
  static constexpr int kWords = 34;
  static constexpr int kNarrowGroups = 0;  // as IQ4_NL
  static constexpr int kSubColumns = 32;
  static constexpr int kOffsetLog2 = V::kAddsIn16Bits ? -1 : 7;
  static constexpr int kSetWords = 1;
  static constexpr int kSetGroups = 1;
  static constexpr int kPerLineTokens = 2;
  static constexpr int kUnpackTokensOf16Registers = 5;
  using Scales = IQ4_XSScales;
  static constexpr int kRun = 1;
  static constexpr int block_of(int chunk, int nibble) { return 2 * chunk + nibble; }
  template <int vector>
  static V::I weights(const uint8_t* set) {
    return V::lookup16(V::kAddsIn16Bits ? kValuesIQ4 : kShiftedIQ4, four_bits<vector>(set));
  }
};

#define TKT_TYPES_OF_FILE(X) X(IQ4_XS)
