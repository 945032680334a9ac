// Primitives on 256-bit registers, shared by the ISAs that have them; products of bytes differ and stand in each ISA's
// file.

// 16 lanes as two 256-bit registers.
struct Avx2Primitives {
  struct F {
    __m256 low, high;
  };
  struct I {
    __m256i low, high;
  };
  // 16 registers, two to a panel: 6 tokens are 12 sums, weights and an activation. K-quants hold scaled sums beside
  // them. GOPS of one core of Zen 5 for 4 and 6 tokens, AVX2: F16 97 and 122, Q5_0 146 and 176, Q4_K 272 and 223, Q5_K
  // 171 and 62; AVX-VNNI: Q5_0 198 and 237, Q4_K 328 and 319, Q6_K 238 and 195. Tiles of 2 or 3 gain nowhere.
  static constexpr int kTileTokens = 6;
  static constexpr int kTileTokensK = 4;
  static constexpr int kTilePanels = 1;
  static constexpr bool kTouchesNextLine = false;
  // 12 chains of fma, where 8 would just hide the latency: one core of Zen 3, 512 keys, 32.4 and 29.8 ms for 128
  // tokens.
  static constexpr int kScoreKeys = 6;
  static constexpr int kShuffledKeys = 0;  // a broadcast serves two registers
  static constexpr int kScoreGroups = 1;
  static constexpr int kGroupedScoreKeys = 4;
  static constexpr int kSumVectors = 1;
  static constexpr int kSumHeads = 6;

  TKT_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  TKT_INLINE void prefetch_to_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  TKT_INLINE void prefetch_here(const void* p) {
    __asm__ volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(p)));
  }
  TKT_INLINE F zero_f() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  TKT_INLINE F set_f(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  TKT_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  TKT_INLINE F load_four(const float* p) {
    const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
    return {four, four};
  }
  TKT_INLINE __m256 one_of_four_8(__m256 x, int i) {
    return i == 0   ? _mm256_permute_ps(x, 0x00)
           : i == 1 ? _mm256_permute_ps(x, 0x55)
           : i == 2 ? _mm256_permute_ps(x, 0xaa)
                    : _mm256_permute_ps(x, 0xff);
  }
  TKT_INLINE F one_of_four(F x, int i) { return {one_of_four_8(x.low, i), one_of_four_8(x.high, i)}; }
  TKT_INLINE void store(float* p, F x) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
  }
  TKT_INLINE F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  TKT_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
  TKT_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  TKT_INLINE F div(F a, F b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
  TKT_INLINE F min(F a, F b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
  TKT_INLINE F max(F a, F b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
  TKT_INLINE F abs(F a) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(a.low, mask), _mm256_and_ps(a.high, mask)};
  }
  TKT_INLINE F fma(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  TKT_INLINE F fnma(F a, F b, F c) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
  }
  TKT_INLINE F to_float(I a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
  TKT_INLINE I to_int(F a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
  TKT_INLINE I float_to_bits(F a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
  TKT_INLINE F bits_to_float(I a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
  TKT_INLINE F load_f16(const void* p) {
    const __m128i* halves = static_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
  }
  TKT_INLINE __m256 bf16_8(const __m128i* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
  }
  TKT_INLINE F load_bf16(const void* p) {
    const __m128i* halves = static_cast<const __m128i*>(p);
    return {bf16_8(halves), bf16_8(halves + 1)};
  }
  // The low 16 bits of 8 lanes as 8 packed halves.
  TKT_INLINE __m256 f16_of_lanes(__m256i a) {
    const __m256i low16 = _mm256_and_si256(a, _mm256_set1_epi32(0xffff));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low16, low16), 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
  }
  TKT_INLINE F low_f16(I a) { return {f16_of_lanes(a.low), f16_of_lanes(a.high)}; }
  TKT_INLINE F high_f16(I a) {
    return {f16_of_lanes(_mm256_srli_epi32(a.low, 16)), f16_of_lanes(_mm256_srli_epi32(a.high, 16))};
  }
  TKT_INLINE void store_i8(int8_t* p, I a) {
    // packs work per 128-bit half: lanes arrive as 0-3, 8-11, 4-7, 12-15.
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.low, a.high), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }

  TKT_INLINE int32_t sum_of_lanes(I a) {
    const __m256i eight = _mm256_add_epi32(a.low, a.high);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return _mm_cvtsi128_si32(four);
  }
  TKT_INLINE int32_t largest_lane_i(I a) {
    const __m256i eight = _mm256_max_epi32(a.low, a.high);
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return _mm_cvtsi128_si32(four);
  }
  TKT_INLINE I set_i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  TKT_INLINE I load_i(const void* p) {
    const __m256i* halves = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
  }
  TKT_INLINE void store_i(void* p, I a) {
    __m256i* halves = static_cast<__m256i*>(p);
    _mm256_storeu_si256(halves, a.low);
    _mm256_storeu_si256(halves + 1, a.high);
  }
  TKT_INLINE I load_bytes(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
  }
  TKT_INLINE I lookup16(const int8_t* table, I places) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm256_shuffle_epi8(t, places.low), _mm256_shuffle_epi8(t, places.high)};
  }
  TKT_INLINE I broadcast_i(const void* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return set_i(x);
  }
  TKT_INLINE I and_i(I a, I b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
  TKT_INLINE I or_i(I a, I b) { return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)}; }
  TKT_INLINE I xor_i(I a, I b) { return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)}; }
  TKT_INLINE I add_i(I a, I b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
  TKT_INLINE I widen_pairs(I a, I factors) {
    return {_mm256_madd_epi16(a.low, factors.low), _mm256_madd_epi16(a.high, factors.high)};
  }
  // Bytes `low` and `high` of each lane as a pair of 16 bits, unsigned.
  template <int low, int high>
  TKT_INLINE I byte_pair(I a) {
    return bytes_of_lanes(a, 0x80008000u | low | high << 16);
  }
  // The bytes of each lane that `which` names, 0 where that is 0x80.
  TKT_INLINE I bytes_of_lanes(I a, uint32_t which) {
    const __m256i first =
        _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c);
    const __m256i places = _mm256_add_epi8(_mm256_set1_epi32(static_cast<int32_t>(which)), first);
    return {_mm256_shuffle_epi8(a.low, places), _mm256_shuffle_epi8(a.high, places)};
  }
  TKT_INLINE I broadcast_pair(const int32_t* two) {
    long long both;
    __builtin_memcpy(&both, two, sizeof both);
    const __m256i pairs = _mm256_shuffle_epi8(_mm256_set1_epi64x(both), _mm256_set1_epi32(0x05040100));
    return {pairs, pairs};
  }
  // a - b in byte i of each lane where bit first + i of `bits` is set, else `otherwise`.
  template <int first>
  TKT_INLINE I sub_bytes_where(I bits, I a, I b, I otherwise) {
    bits = bytes_of_lanes(bits, first / 8 * 0x01010101u);
    const __m256i each = _mm256_set1_epi32(static_cast<int32_t>(0x08040201u << first % 8));
    const auto half = [each](__m256i mask, __m256i from, __m256i less, __m256i kept) {
      return _mm256_blendv_epi8(kept, _mm256_sub_epi8(from, less),
                                _mm256_cmpeq_epi8(_mm256_and_si256(mask, each), each));
    };
    return {half(bits.low, a.low, b.low, otherwise.low), half(bits.high, a.high, b.high, otherwise.high)};
  }
  // Of pairs of 32 bits, 8 in each, the lower ones and the upper ones.
  template <int which>
  TKT_INLINE __m256i of_pairs_8(__m256i a, __m256i b) {
    const __m256 both = _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), which);
    return _mm256_permute4x64_epi64(_mm256_castps_si256(both), 0xd8);
  }
  TKT_INLINE I lower_of_pairs(I a, I b) { return {of_pairs_8<0x88>(a.low, a.high), of_pairs_8<0x88>(b.low, b.high)}; }
  TKT_INLINE I upper_of_pairs(I a, I b) { return {of_pairs_8<0xdd>(a.low, a.high), of_pairs_8<0xdd>(b.low, b.high)}; }
  // Likewise, where bit i of `where` is set for byte i of all.
  TKT_INLINE I sub_bytes_of(uint64_t where, I a, I b, I otherwise) {
    const __m256i places = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i each = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
    const auto half = [=](uint64_t bits, __m256i from, __m256i less, __m256i kept) {
      const __m256i mask = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int32_t>(bits)), places);
      return _mm256_blendv_epi8(kept, _mm256_sub_epi8(from, less),
                                _mm256_cmpeq_epi8(_mm256_and_si256(mask, each), each));
    };
    return {half(where, a.low, b.low, otherwise.low), half(where >> 32, a.high, b.high, otherwise.high)};
  }
  TKT_INLINE I load_two(const void* first, const void* second) {
    return {_mm256_loadu_si256(static_cast<const __m256i*>(first)),
            _mm256_loadu_si256(static_cast<const __m256i*>(second))};
  }
  TKT_INLINE I set_eight(uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g,
                         uint64_t h) {
    const auto two = [](uint64_t low, uint64_t high) {
      return _mm_set_epi64x(static_cast<long long>(high), static_cast<long long>(low));
    };
    return {_mm256_inserti128_si256(_mm256_castsi128_si256(two(a, b)), two(c, d), 1),
            _mm256_inserti128_si256(_mm256_castsi128_si256(two(e, f)), two(g, h), 1)};
  }
  // Lane 4 n + i: the sum of lanes 4 n to 4 n + 3 of vector i.
  TKT_INLINE I sums_of_fours(I a, I b, I c, I d) {
    const auto half = [](__m256i p, __m256i q, __m256i r, __m256i s) {
      return _mm256_hadd_epi32(_mm256_hadd_epi32(p, q), _mm256_hadd_epi32(r, s));
    };
    return {half(a.low, b.low, c.low, d.low), half(a.high, b.high, c.high, d.high)};
  }
  // Lane i of vector j becomes lane j of vector i.
  TKT_INLINE void transpose_8(__m256i (&x)[8]) {
    __m256i y[8];
    TKT_UNROLL for (int i = 0; i < 8; i += 2) {
      y[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
      y[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
    }
    TKT_UNROLL for (int i = 0; i < 8; i += 4) {
      x[i] = _mm256_unpacklo_epi64(y[i], y[i + 2]);
      x[i + 1] = _mm256_unpackhi_epi64(y[i], y[i + 2]);
      x[i + 2] = _mm256_unpacklo_epi64(y[i + 1], y[i + 3]);
      x[i + 3] = _mm256_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    TKT_UNROLL for (int i = 0; i < 4; ++i) {
      y[i] = _mm256_permute2x128_si256(x[i], x[i + 4], 0x20);
      y[i + 4] = _mm256_permute2x128_si256(x[i], x[i + 4], 0x31);
    }
    TKT_UNROLL for (int i = 0; i < 8; ++i) x[i] = y[i];
  }
  TKT_INLINE void transpose(I (&x)[16]) {
    __m256i quarters[4][8];
    TKT_UNROLL for (int i = 0; i < 8; ++i) {
      quarters[0][i] = x[i].low;
      quarters[1][i] = x[i].high;
      quarters[2][i] = x[i + 8].low;
      quarters[3][i] = x[i + 8].high;
    }
    TKT_UNROLL for (int i = 0; i < 4; ++i) transpose_8(quarters[i]);
    TKT_UNROLL for (int i = 0; i < 8; ++i) {
      x[i] = {quarters[0][i], quarters[2][i]};
      x[i + 8] = {quarters[1][i], quarters[3][i]};
    }
  }
  TKT_INLINE I max_i(I a, I b) { return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)}; }
  TKT_INLINE I sub_i(I a, I b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
  TKT_INLINE I mul_i(I a, I b) { return {_mm256_mullo_epi32(a.low, b.low), _mm256_mullo_epi32(a.high, b.high)}; }
  template <int N>
  TKT_INLINE I shift_right(I a) {
    if constexpr (N == 0) return a;
    return {_mm256_srli_epi32(a.low, N), _mm256_srli_epi32(a.high, N)};
  }
  template <int N>
  TKT_INLINE I shift_left(I a) {
    if constexpr (N == 0) return a;
    return {_mm256_slli_epi32(a.low, N), _mm256_slli_epi32(a.high, N)};
  }
  template <int N>
  TKT_INLINE I shift_right_signed(I a) {
    return {_mm256_srai_epi32(a.low, N), _mm256_srai_epi32(a.high, N)};
  }
};
