// IQ4_NL (formats/iq4_nl.h).

struct IQ4_NLWords {
  static constexpr int kColumns = 32;
  static constexpr bool kUnpacks = false;
  static constexpr int kScaleBytes = 32;
  static constexpr int kWords = 4;
  static constexpr int kNarrowGroups = 0;  // 2 * 241 * 127 = 61,214, but signed 2 * 127 * 127 = 32,258
  static constexpr int kOffsetLog2 = V::kAddsIn16Bits ? -1 : 7;
  static constexpr bool kHasMinima = false;
  static constexpr int kPerLineTokens = 2;
  static V::F load_scales(const uint8_t* p) { return V::load_f16(p); }
  static constexpr int group_at(int position) { return position / 2 + position % 2 * 4; }
  template <int position>
  static V::I weights(const uint8_t* words) {
    return V::lookup16(V::kAddsIn16Bits ? kValuesIQ4 : kShiftedIQ4, four_bits<position % 2>(words + position / 2 * 64));
  }
};

#define TKT_TYPES_OF_FILE(X) X(IQ4_NL)
