// Primitives on 512-bit registers, shared by the ISAs that have them; dot4 alone differs and stands in each ISA's file.

struct Avx512Primitives {
  using F = __m512;
  using I = __m512i;
  static constexpr int kTileTokens = 6;  // 6 x 2 accumulators, 6 x 2 block sums, weights and scales: 32 registers
  static constexpr int kTileTokensK = 6;
  static constexpr int kTilePanels = 2;
  static constexpr bool kTouchesNextLine = true;
  static constexpr int kScoreKeys = 8;
  static constexpr int kShuffledKeys = 2;  // one core of Zen 5, keys in L2: 220 GFLOPS with it, 210 without
  static constexpr int kScoreGroups = 2;
  static constexpr int kGroupedScoreKeys = 8;
  static constexpr int kSumVectors = 2;
  static constexpr int kSumHeads = 8;

  TKT_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  TKT_INLINE void prefetch_to_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  TKT_INLINE void prefetch_here(const void* p) {
    __asm__ volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(p)));
  }
  TKT_INLINE F zero_f() { return _mm512_setzero_ps(); }
  TKT_INLINE F set_f(float x) { return _mm512_set1_ps(x); }
  TKT_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  TKT_INLINE F load_four(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
  TKT_INLINE F one_of_four(F x, int i) {
    return i == 0   ? _mm512_permute_ps(x, 0x00)
           : i == 1 ? _mm512_permute_ps(x, 0x55)
           : i == 2 ? _mm512_permute_ps(x, 0xaa)
                    : _mm512_permute_ps(x, 0xff);
  }
  TKT_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  TKT_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  TKT_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  TKT_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  TKT_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  TKT_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  TKT_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  TKT_INLINE F abs(F a) { return _mm512_abs_ps(a); }
  TKT_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  TKT_INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  TKT_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  TKT_INLINE I to_int(F a) { return _mm512_cvtps_epi32(a); }
  TKT_INLINE I float_to_bits(F a) { return _mm512_castps_si512(a); }
  TKT_INLINE F bits_to_float(I a) { return _mm512_castsi512_ps(a); }
  TKT_INLINE F load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
  TKT_INLINE F load_bf16(const void* p) {
    const __m256i bits = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  TKT_INLINE F low_f16(I a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }
  TKT_INLINE F high_f16(I a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16))); }
  TKT_INLINE void store_i8(int8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a));
  }

  TKT_INLINE int32_t sum_of_lanes(I a) { return _mm512_reduce_add_epi32(a); }
  TKT_INLINE int32_t largest_lane_i(I a) { return _mm512_reduce_max_epi32(a); }
  TKT_INLINE I set_i(int32_t x) { return _mm512_set1_epi32(x); }
  TKT_INLINE I load_i(const void* p) { return _mm512_loadu_si512(p); }
  TKT_INLINE void store_i(void* p, I a) { _mm512_storeu_si512(p, a); }
  TKT_INLINE I load_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  TKT_INLINE I lookup16(const int8_t* table, I places) {
    const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(t), places);
  }
  TKT_INLINE I broadcast_i(const void* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
  }
  TKT_INLINE I and_i(I a, I b) { return _mm512_and_si512(a, b); }
  TKT_INLINE I or_i(I a, I b) { return _mm512_or_si512(a, b); }
  TKT_INLINE I xor_i(I a, I b) { return _mm512_xor_si512(a, b); }
  TKT_INLINE I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
  TKT_INLINE I widen_pairs(I a, I factors) { return _mm512_madd_epi16(a, factors); }
  // Bytes `low` and `high` of each lane as a pair of 16 bits, unsigned.
  template <int low, int high>
  TKT_INLINE I byte_pair(I a) {
    const __m128i places = _mm_add_epi8(_mm_set1_epi32(static_cast<int32_t>(0x80008000u | low | high << 16)),
                                        _mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
    return _mm512_shuffle_epi8(a, _mm512_broadcast_i32x4(places));
  }
  TKT_INLINE I broadcast_pair(const int32_t* two) {
    long long both;
    __builtin_memcpy(&both, two, sizeof both);
    return _mm512_shuffle_epi8(_mm512_set1_epi64(both), _mm512_set1_epi32(0x05040100));
  }
  // a - b in byte i of each lane where bit first + i of `bits` is set, else `otherwise`.
  template <int first>
  TKT_INLINE I sub_bytes_where(I bits, I a, I b, I otherwise) {
    const __m128i places =
        _mm_add_epi8(_mm_set1_epi8(first / 8), _mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
    const I each = _mm512_set1_epi32(static_cast<int32_t>(0x08040201u << first % 8));
    const __mmask64 where = _mm512_test_epi8_mask(_mm512_shuffle_epi8(bits, _mm512_broadcast_i32x4(places)), each);
    return _mm512_mask_sub_epi8(otherwise, where, a, b);
  }
  // Of pairs of 32 bits, 8 in each, the lower ones and the upper ones.
  TKT_INLINE I lower_of_pairs(I a, I b) {
    return _mm512_permutex2var_epi32(a, _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                                     b);
  }
  TKT_INLINE I upper_of_pairs(I a, I b) {
    return _mm512_permutex2var_epi32(a, _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31),
                                     b);
  }
  // Likewise, where bit i of `where` is set for byte i of all.
  TKT_INLINE I sub_bytes_of(uint64_t where, I a, I b, I otherwise) {
    return _mm512_mask_sub_epi8(otherwise, where, a, b);
  }
  TKT_INLINE I load_two(const void* first, const void* second) {
    const __m256i lower = _mm256_loadu_si256(static_cast<const __m256i*>(first));
    return _mm512_inserti64x4(_mm512_castsi256_si512(lower), _mm256_loadu_si256(static_cast<const __m256i*>(second)),
                              1);
  }
  TKT_INLINE I set_eight(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g,
                         uint64_t h) {
    const auto two = [](uint64_t low, uint64_t high) {
      return _mm_set_epi64x(static_cast<long long>(high), static_cast<long long>(low));
    };
    const __m256i lower = _mm256_inserti128_si256(_mm256_castsi128_si256(two(a, b)), two(c, d), 1);
    const __m256i upper = _mm256_inserti128_si256(_mm256_castsi128_si256(two(e, f)), two(g, h), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1);
  }
  // Lane 4 n + i: the sum of lanes 4 n to 4 n + 3 of vector i.
  TKT_INLINE I sums_of_fours(I a, I b, I c, I d) {
    const I ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const I cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  }
  // Lane i of vector j becomes lane j of vector i.
  TKT_INLINE void transpose(I (&x)[16]) {
    I y[16];
    TKT_UNROLL for (int i = 0; i < 16; i += 2) {
      y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
      y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    TKT_UNROLL for (int i = 0; i < 16; i += 4) {
      x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
      x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
      x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
      x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    TKT_UNROLL for (int i = 0; i < 4; ++i) {
      y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
      y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
      y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
      y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
    TKT_UNROLL for (int i = 0; i < 8; ++i) {
      x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
      x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    }
  }
  TKT_INLINE I max_i(I a, I b) { return _mm512_max_epi32(a, b); }
  TKT_INLINE I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
  TKT_INLINE I mul_i(I a, I b) { return _mm512_mullo_epi32(a, b); }
  template <int N>
  TKT_INLINE I shift_right(I a) {
    if constexpr (N == 0) return a;
    return _mm512_srli_epi32(a, N);
  }
  template <int N>
  TKT_INLINE I shift_left(I a) {
    if constexpr (N == 0) return a;
    return _mm512_slli_epi32(a, N);
  }
  template <int N>
  TKT_INLINE I shift_right_signed(I a) {
    return _mm512_srai_epi32(a, N);
  }
};
