// Q2_K (formats/block_formats.h).

struct Q2_KWords {
  static constexpr int kColumns = 256;
  static constexpr bool kUnpacks = true;
  static constexpr int kScaleBytes = 0;  // none lead a block
  static constexpr int kHeadWords = 5;
  static constexpr int kWords = 21;
  static constexpr int kNarrowGroups = 4;  // 4 * 2 * 3 * 127 = 3,048
  static constexpr int kSubColumns = 16;
  static constexpr int kSetWords = 1;
  static constexpr int kSetGroups = 2;
  static constexpr int kOffsetLog2 = -1;  // quants are unsigned
  static constexpr int kPerLineTokens = 2;
  static constexpr int kUnpackTokensOf16Registers = 3;
  struct Scales {
    static constexpr bool kHasMinima = true;
    V::I bytes[4];  // 16 times a scale in the low, a minimum in the high nibble
    V::F d;
    V::F dmin;
    void read(const uint8_t* words, const uint8_t*) {
      const V::I head = V::load_i(words);
      d = V::low_f16(head);
      dmin = V::high_f16(head);
      TKT_UNROLL for (int i = 0; i < 4; ++i) bytes[i] = V::load_i(words + (1 + i) * 64);
    }
    // Of sub-block j, counted from that half of the block.
    template <int j>
    V::I scale(int half = 0) const {
      return V::and_i(V::template shift_right<8 * (j % 4)>(bytes[2 * half + j / 4]), V::set_i(0x0f));
    }
    // Where V::kFoldsScales: the scale twice, as 16 bits.
    template <int j>
    V::I scale_pair() const {
      return V::and_i(V::template byte_pair<j % 4, j % 4>(bytes[j / 4]), V::set_i(0x000f000f));
    }
    // Both minima of a block of 32 columns, counted likewise.
    template <int block>
    V::I min(int half = 0) const {
      constexpr int kFirst = block % 2 * 2;
      const V::I pair = V::template byte_pair<kFirst, kFirst + 1>(bytes[2 * half + block / 2]);
      return V::and_i(V::template shift_right<4>(pair), V::set_i(0x000f000f));
    }
  };
  static constexpr int kRun = 1;
  static constexpr int block_of(int chunk, int nibble) { return 2 * chunk + nibble; }
  template <int vector>
  static V::I weights(const uint8_t* set) {
    return two_bits<vector>(set);
  }
};

#define TKT_TYPES_OF_FILE(X) X(Q2_K)
