// MXFP4 (formats/mxfp4.h).

// kValuesE2M1 + 16: unsigned, for products of bytes.
constexpr int8_t kShiftedE2M1[16] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};
constexpr bool is_shifted_by_16() {
  for (int i = 0; i < 16; ++i) {
    if (kShiftedE2M1[i] != kValuesE2M1[i] + 16) return false;
  }
  return true;
}
static_assert(is_shifted_by_16());

struct MXFP4Words {
  static constexpr int kColumns = 32;
  static constexpr bool kUnpacks = V::kUnpacks32Wide;
  static constexpr int kScaleBytes = 16;
  static constexpr int kWords = 4;
  static constexpr int kNarrowGroups = 4;  // 4 * 2 * 28 * 127 = 28,448
  static constexpr int kOffsetLog2 = 4;
  static constexpr bool kHasMinima = false;
  static constexpr int kPerLineTokens = 2;
  static constexpr int kUnpackTokensOf16Registers = 12;
  // 2^(e - 128) as a product of two powers of two that are both normal numbers, so that e = 0, a denormal, is no
  // exception.
  static V::F load_scales(const uint8_t* p) {
    const V::I e = V::load_bytes(p);
    const V::I half = V::template shift_right<1>(e);
    const V::I rest = V::sub_i(e, half);
    const auto power = [](V::I x) { return V::bits_to_float(V::template shift_left<23>(V::add_i(x, V::set_i(63)))); };
    return V::mul(power(half), power(rest));
  }
  static constexpr int group_at(int position) { return position / 2 + position % 2 * 4; }
  template <int position>
  static V::I weights(const uint8_t* words) {
    return V::lookup16(kShiftedE2M1, four_bits<position % 2>(words + position / 2 * 64));
  }
};

#define TKT_TYPES_OF_FILE(X) X(MXFP4)
