// Q6_K (formats/block_formats.h).

struct Q6_KWords {
  static constexpr int kColumns = 256;
  static constexpr bool kUnpacks = true;
  static constexpr int kWords = 52;
  static constexpr int kScaleBytes = 32;
  static constexpr int kNarrowGroups = 2;  // 2 * 2 * 63 * 127 = 32,004
  static constexpr int kSubColumns = 16;
  static constexpr int kSetWords = 3;
  static constexpr int kSetGroups = 2;
  static constexpr int kOffsetLog2 = 5;
  static constexpr int kPerLineTokens = 2;
  static constexpr int kUnpackTokensOf16Registers = 3;
  struct Scales {
    static constexpr bool kHasMinima = false;
    V::I bytes[4];  // 16 signed scales
    V::F d;
    void read(const uint8_t* words, const uint8_t* leading) {
      d = V::load_f16(leading);
      TKT_UNROLL for (int i = 0; i < 4; ++i) bytes[i] = V::load_i(words + i * 64);
    }
    // Of sub-block j, counted from that half of the block.
    template <int j>
    V::I scale(int half = 0) const {
      return V::template shift_right_signed<24>(V::template shift_left<24 - 8 * (j % 4)>(bytes[2 * half + j / 4]));
    }
    template <int j, class Isa = V>
    V::I scale_pair() const {
      return Isa::template signed_byte_pair<j % 4, j % 4, 0>(bytes[j / 4]);
    }
    // The scales of a block of 32 columns times the offset.
    template <int block, class Isa = V>
    V::I offset_pair() const {
      return Isa::template signed_byte_pair<block % 2 * 2, block % 2 * 2 + 1, kOffsetLog2>(bytes[block / 2]);
    }
  };
  static constexpr int kRun = 2;
  static constexpr int block_of(int chunk, int nibble) { return chunk / 2 * 4 + chunk % 2 + 2 * nibble; }
  template <int vector>
  static V::I weights(const uint8_t* set) {
    return six_bits<vector>(set);
  }
};

#define TKT_TYPES_OF_FILE(X) X(Q6_K)
