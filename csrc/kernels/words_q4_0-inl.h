// Q4_0 (formats/block_formats.h).

struct Q4_0Words {
  static constexpr int kColumns = 32;
  static constexpr bool kUnpacks = V::kUnpacks32Wide;
  static constexpr int kScaleBytes = 32;  // leading, of the 16 rows
  static constexpr int kWords = 4;
  static constexpr int kNarrowGroups = 8;  // 8 * 2 * 15 * 127 = 30,480
  static constexpr int kOffsetLog2 = 3;
  static constexpr bool kHasMinima = false;
  static constexpr int kPerLineTokens = 2;
  static constexpr int kUnpackTokensOf16Registers = 12;
  static V::F load_scales(const uint8_t* p) { return V::load_f16(p); }
  static constexpr int group_at(int position) { return position / 2 + position % 2 * 4; }
  template <int position>
  static V::I weights(const uint8_t* words) {
    return four_bits<position % 2>(words + position / 2 * 64);
  }
};

#define TKT_TYPES_OF_FILE(X) X(Q4_0)
