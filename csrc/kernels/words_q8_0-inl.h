// Q8_0 (formats/block_formats.h).

struct Q8_0Words {
  static constexpr int kColumns = 32;
  static constexpr bool kUnpacks = false;
  static constexpr int kScaleBytes = 32;  // leading, of the 16 rows
  static constexpr int kWords = 8;
  static constexpr int kNarrowGroups = 0;  // 2 * 255 * 127 = 64,770, but signed 2 * 128 * 127 = 32,512
  static constexpr int kOffsetLog2 = V::kAddsIn16Bits ? -1 : 7;
  static constexpr bool kHasMinima = false;
  static constexpr int kPerLineTokens = 6;
  static V::F load_scales(const uint8_t* p) { return V::load_f16(p); }
  static constexpr int group_at(int position) { return position; }
  template <int position>
  static V::I weights(const uint8_t* words) {
    const V::I w = word_at(words, position);
    return V::kAddsIn16Bits ? w : V::xor_i(w, V::set_i(static_cast<int32_t>(0x80808080u)));
  }
};

#define TKT_TYPES_OF_FILE(X) X(Q8_0)
