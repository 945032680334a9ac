// What Q4_K and Q5_K have in common: the scales, and how sets of groups follow each other.

// Scales of 6 bits; words 0 (d, dmin) and 1..3 (scales) lead their blocks.
struct SixBitScales {
  static constexpr bool kHasMinima = true;
  V::I scale_bytes[2];  // sc[0..3], sc[4..7]: one byte each in a 32-bit lane
  V::I min_bytes[2];
  V::F d;
  V::F dmin;

  void read(const uint8_t* words, const uint8_t*) {
    const V::I head = V::load_i(words);
    d = V::low_f16(head);
    dmin = V::high_f16(head);
    const V::I w0 = V::load_i(words + 64);
    const V::I w1 = V::load_i(words + 128);
    const V::I w2 = V::load_i(words + 192);
    const V::I low6 = V::set_i(0x3f3f3f3f);
    const V::I low4 = V::set_i(0x0f0f0f0f);
    const V::I low2 = V::set_i(0x03030303);
    scale_bytes[0] = V::and_i(w0, low6);
    min_bytes[0] = V::and_i(w1, low6);
    scale_bytes[1] =
        V::or_i(V::and_i(w2, low4), V::template shift_left<4>(V::and_i(V::template shift_right<6>(w0), low2)));
    min_bytes[1] = V::or_i(V::and_i(V::template shift_right<4>(w2), low4),
                           V::template shift_left<4>(V::and_i(V::template shift_right<6>(w1), low2)));
  }
  template <int j>
  static V::I byte_of(V::I bytes) {
    return V::and_i(V::template shift_right<8 * (j % 4)>(bytes), V::set_i(0xff));
  }
  // Of sub-block j, counted from that half of the block.
  template <int j>
  V::I scale(int half = 0) const {
    return byte_of<j>(scale_bytes[half + j / 4]);
  }
  template <int j>
  V::F min(int half = 0) const {
    return V::to_float(byte_of<j>(min_bytes[half + j / 4]));
  }
  // Where V::kFoldsScales: the scale twice, as 16 bits.
  template <int j, class Isa = V>
  V::I scale_pair() const {
    return Isa::template byte_pair<j % 4, j % 4>(scale_bytes[j / 4]);
  }
};

struct SixBitScaleWords {
  static constexpr int kColumns = 256;
  static constexpr bool kUnpacks = true;
  static constexpr int kScaleBytes = 0;  // none lead a block
  static constexpr int kHeadWords = 4;
  static constexpr int kSubColumns = 32;
  static constexpr int kOffsetLog2 = -1;  // quants are unsigned
  static constexpr int kPerLineTokens = 2;
  static constexpr int kUnpackTokensOf16Registers = 5;
  using Scales = SixBitScales;
  static constexpr int kRun = 1;
  static constexpr int block_of(int chunk, int nibble) { return 2 * chunk + nibble; }
};
