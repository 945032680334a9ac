// F32, F16 and BF16: one fma per column.

struct F32Words {
  static constexpr int kColumns = 1;
  static constexpr bool kUnpacks = false;
  static constexpr int kBytes = 64;
  static constexpr int kPerLineTokens = 0;
  static V::F weights(const uint8_t* p) { return V::load(reinterpret_cast<const float*>(p)); }
};

struct F16Words {
  static constexpr int kColumns = 1;
  static constexpr bool kUnpacks = false;
  static constexpr int kBytes = 32;
  static constexpr int kPerLineTokens = 0;
  static V::F weights(const uint8_t* p) { return V::load_f16(p); }
};

struct BF16Words {
  static constexpr int kColumns = 1;
  static constexpr bool kUnpacks = false;
  static constexpr int kBytes = 32;
  static constexpr int kPerLineTokens = 0;
  static V::F weights(const uint8_t* p) { return V::load_bf16(p); }
};

#define TKT_TYPES_OF_FILE(X) X(F32) X(F16) X(BF16)
