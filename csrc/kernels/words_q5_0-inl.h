// Q5_0 (formats/block_formats.h).

struct Q5_0Words {
  static constexpr int kColumns = 32;
  static constexpr bool kUnpacks = V::kUnpacks32Wide;
  static constexpr int kScaleBytes = 32;  // leading, of the 16 rows
  static constexpr int kWords = 5;
  static constexpr int kNarrowGroups = 4;  // 4 * 2 * 31 * 127 = 31,496
  static constexpr int kOffsetLog2 = 4;
  static constexpr bool kHasMinima = false;
  static constexpr int kPerLineTokens = 2;
  static constexpr int kUnpackTokensOf16Registers = 7;
  static V::F load_scales(const uint8_t* p) { return V::load_f16(p); }
  static constexpr int group_at(int position) { return position / 2 + position % 2 * 4; }
  template <int position>
  static V::I weights(const uint8_t* words) {
    return five_bits<position>(words);
  }
};

#define TKT_TYPES_OF_FILE(X) X(Q5_0)
