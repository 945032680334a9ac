// What Q4_1 and Q5_1 have in common: word 0 of a block holds d in the low, the minimum in the high 16 bits of a lane.

struct ScaleAndMinimumWords {
  static constexpr int kColumns = 32;
  static constexpr bool kUnpacks = V::kUnpacks32Wide;
  static constexpr int kScaleBytes = 0;   // none lead a block
  static constexpr int kOffsetLog2 = -1;  // quants are unsigned
  static constexpr bool kHasMinima = true;
  static constexpr int kPerLineTokens = 2;
  static V::F load_scales(const uint8_t* p) { return V::low_f16(V::load_i(p)); }
  static V::F load_minima(const uint8_t* p) { return V::high_f16(V::load_i(p)); }
  static constexpr int group_at(int position) { return position / 2 + position % 2 * 4; }
};
