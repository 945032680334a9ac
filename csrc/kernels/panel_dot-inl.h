// Dot products of packed panels with activation rows: the loop nests, written once over an ISA's primitives.
//
// An ISA file defines `struct V` in its namespace (see the list in csrc/README.md) and includes this file inside that
// namespace. Never include it anywhere else. No function of the standard library may be instantiated here: its weak
// symbol would carry this file's instructions to CPUs that lack them.
//
// A tile is T tokens x R panels of 16 rows; lane = row, so no lane is ever reduced and every output sees the same
// operations in the same order whatever T and R are.

// Weights come from memory once per token, and a core works longer on a line than the hardware prefetchers look ahead. Each
// step asks for the lines that the same step needs one page and eight pages later: the far one brings a line into L2
// before the near one wants it in L1. Share of the read bandwidth of two cores of Zen 5 with none, near, near and far:
// Q4_K 0.64, 0.84, 0.95, Q6_K 0.45, 0.70, 0.94, Q8_0 0.86, 0.92, 0.96. Other distances, other hints (T1, T2, NTA) and
// every second or fourth line alone were all slower. With more tokens there is enough work to a line.
template <int kLines, int kSteps, int step, int T, int R>
TKT_INLINE void prefetch_ahead(const uint8_t* const (&words)[R]) {
  constexpr int64_t kNear = 4096;
  constexpr int64_t kFar = 32768;
  constexpr int line = step * kLines / kSteps;
  if constexpr (step == 0 || line != (step - 1) * kLines / kSteps) {
  TKT_UNROLL for (int r = 0; r < R; ++r) {
      V::prefetch(words[r] + line * 64 + kNear);
      if constexpr (T == 1) V::prefetch(words[r] + line * 64 + kFar);
    }
  }
}

// dot += the products of one group of 4 columns. Without VNNI, byte products are first added in 16 bits, for as many
// groups as cannot overflow: kNarrowGroups * 2 * (largest weight) * 127 <= 32,767; 0 where not even one group can.
template <int kNarrowGroups, int group, int kGroups, class Isa = V>
TKT_INLINE void accumulate(typename Isa::I& dot, typename Isa::I& narrow, typename Isa::I w, typename Isa::I a) {
  if constexpr (!Isa::kAddsIn16Bits) {
    dot = Isa::dot4(dot, w, a);
  } else if constexpr (kNarrowGroups == 0) {
    dot = Isa::dot4_wide(dot, w, a);
  } else {
    const typename Isa::I pairs = Isa::pair_products(w, a);
    narrow = group % kNarrowGroups == 0 ? pairs : Isa::add_pairs(narrow, pairs);
    constexpr bool kFull = group % kNarrowGroups == kNarrowGroups - 1;
    if constexpr (kFull || group == kGroups - 1) dot = Isa::add_i(dot, Isa::widen_pairs(narrow));
  }
}

// ---- 32-wide types: weight bytes are unsigned (q + offset), the offset is taken back through the block's sum. -------

struct Q4_0Words {
  static constexpr int kWords = 4;
  static constexpr int kNarrowGroups = 8;  // 8 * 2 * 15 * 127 = 30,480
  static constexpr int kOffsetLog2 = 3;
  template <int group>
  static V::I weights(const uint8_t* words) {
    const V::I pair = V::load_i(words + (group % 4) * 64);
    return V::and_i(group < 4 ? pair : V::template shift_right<4>(pair), V::set_i(0x0f0f0f0f));
  }
};

struct Q5_0Words {
  static constexpr int kWords = 5;
  static constexpr int kNarrowGroups = 4;  // 4 * 2 * 31 * 127 = 31,496
  static constexpr int kOffsetLog2 = 4;
  template <int group>
  static V::I weights(const uint8_t* words) {
    const V::I pair = V::load_i(words + (1 + group % 4) * 64);
    const V::I low = V::and_i(group < 4 ? pair : V::template shift_right<4>(pair), V::set_i(0x0f0f0f0f));
    // 4 bits of qh, one for each of the group's weights, are spread to bit 4 of the 4 bytes: the product puts bit i at
    // bits i, i + 7, i + 14, i + 21, so that bit i of the source lands on bit 8 i; the mask drops the rest.
    const V::I bits = V::and_i(V::template shift_right<4 * group>(V::load_i(words)), V::set_i(0x0f));
    const V::I spread = V::and_i(V::mul_i(bits, V::set_i(0x00204081)), V::set_i(0x01010101));
    return V::or_i(low, V::template shift_left<4>(spread));
  }
};

struct Q8_0Words {
  static constexpr int kWords = 8;
  static constexpr int kNarrowGroups = 0;  // 2 * 255 * 127 = 64,770
  static constexpr int kOffsetLog2 = 7;
  template <int group>
  static V::I weights(const uint8_t* words) {
    return V::xor_i(V::load_i(words + group * 64), V::set_i(static_cast<int32_t>(0x80808080u)));
  }
};

template <class Words, int T, int R, int group>
TKT_INLINE void add_groups_32(V::I (&dot)[T][R], V::I (&narrow)[T][R], const uint8_t* const (&words)[R],
                              const int8_t* const (&q)[T]) {
  V::I w[R];
  prefetch_ahead<Words::kWords, 8, group, T>(words);
  TKT_UNROLL for (int r = 0; r < R; ++r) w[r] = Words::template weights<group>(words[r]);
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    const V::I a = V::broadcast_i(q[t] + 4 * group);
    TKT_UNROLL for (int r = 0; r < R; ++r) {
      accumulate<Words::kNarrowGroups, group, 8>(dot[t][r], narrow[t][r], w[r], a);
    }
  }
  if constexpr (group < 7) add_groups_32<Words, T, R, group + 1>(dot, narrow, words, q);
}

template <class Words, int T, int R>
static inline void dot_tile_32(const DotArgs& args, int token) {
  V::F acc[T][R];
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    TKT_UNROLL for (int r = 0; r < R; ++r) acc[t][r] = V::zero_f();
  }
  const ActivationQ8* act[T];
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    act[t] = reinterpret_cast<const ActivationQ8*>(args.activations[token + t]);
  }
  const int64_t scales_offset = args.blocks * Words::kWords * 64;
  for (int64_t b = 0; b < args.blocks; ++b) {
    V::I dot[T][R];
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      const V::I start = V::template shift_left<Words::kOffsetLog2>(V::broadcast_i(&act[t][b].neg_sum));
      TKT_UNROLL for (int r = 0; r < R; ++r) dot[t][r] = start;
    }
    const uint8_t* words[R];
    TKT_UNROLL for (int r = 0; r < R; ++r) words[r] = args.panels[r] + b * Words::kWords * 64;
    const int8_t* q[T];
    TKT_UNROLL for (int t = 0; t < T; ++t) q[t] = act[t][b].q;
    V::I narrow[T][R];
    add_groups_32<Words, T, R, 0>(dot, narrow, words, q);
    TKT_UNROLL for (int r = 0; r < R; ++r) {
      const V::F d = V::load_f16(args.panels[r] + scales_offset + b * 32);
      TKT_UNROLL for (int t = 0; t < T; ++t) {
        acc[t][r] = V::fma(V::mul(d, V::set_f(act[t][b].d)), V::to_float(dot[t][r]), acc[t][r]);
      }
    }
  }
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    TKT_UNROLL for (int r = 0; r < R; ++r) V::store(args.out + (token + t) * 32 + r * 16, acc[t][r]);
  }
}

// ---- K-quants ------------------------------------------------------------------------------------------------------

// Q4_K and Q5_K unpack their 6-bit scales alike; words 0 (d, dmin) and 1..3 (scales) lead their blocks.
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
    scale_bytes[1] = V::or_i(V::and_i(w2, low4),
                             V::template shift_left<4>(V::and_i(V::template shift_right<6>(w0), low2)));
    min_bytes[1] = V::or_i(V::and_i(V::template shift_right<4>(w2), low4),
                           V::template shift_left<4>(V::and_i(V::template shift_right<6>(w1), low2)));
  }
  template <int j>
  static V::I byte_of(const V::I (&bytes)[2]) {
    return V::and_i(V::template shift_right<8 * (j % 4)>(bytes[j / 4]), V::set_i(0xff));
  }
  template <int j>
  V::I scale() const {
    return byte_of<j>(scale_bytes);
  }
  template <int j>
  V::F min() const {
    return V::to_float(byte_of<j>(min_bytes));
  }
};

struct Q4_KWords {
  static constexpr int kWords = 36;
  static constexpr bool kHasSeparateScales = false;
  static constexpr int kNarrowGroups = 8;
  static constexpr int kSubColumns = 32;
  static constexpr int kOffsetLog2 = -1;  // quants are unsigned
  using Scales = SixBitScales;
  template <int j, int group>
  static V::I weights(const uint8_t* words) {
    const V::I pair = V::load_i(words + (4 + (j / 2) * 8 + group) * 64);
    return V::and_i(j % 2 == 0 ? pair : V::template shift_right<4>(pair), V::set_i(0x0f0f0f0f));
  }
};

struct Q5_KWords {
  static constexpr int kWords = 44;
  static constexpr bool kHasSeparateScales = false;
  static constexpr int kNarrowGroups = 4;
  static constexpr int kSubColumns = 32;
  static constexpr int kOffsetLog2 = -1;  // quants are unsigned
  using Scales = SixBitScales;
  template <int j, int group>
  static V::I weights(const uint8_t* words) {
    const V::I pair = V::load_i(words + (12 + (j / 2) * 8 + group) * 64);
    const V::I low = V::and_i(j % 2 == 0 ? pair : V::template shift_right<4>(pair), V::set_i(0x0f0f0f0f));
    const V::I high = V::and_i(V::template shift_right<j>(V::load_i(words + (4 + group) * 64)), V::set_i(0x01010101));
    return V::or_i(low, V::template shift_left<4>(high));
  }
};

struct Q6_KWords {
  static constexpr int kWords = 52;
  static constexpr bool kHasSeparateScales = true;
  static constexpr int kNarrowGroups = 2;  // 2 * 2 * 63 * 127 = 32,004
  static constexpr int kSubColumns = 16;
  static constexpr int kOffsetLog2 = 5;
  struct Scales {
    static constexpr bool kHasMinima = false;
    V::I bytes[4];  // 16 signed scales
    V::F d;
    void read(const uint8_t* words, const uint8_t* separate) {
      TKT_UNROLL for (int i = 0; i < 4; ++i) bytes[i] = V::load_i(words + (48 + i) * 64);
      d = V::load_f16(separate);
    }
    template <int j>
    V::I scale() const {
      return V::template shift_right_signed<24>(V::template shift_left<24 - 8 * (j % 4)>(bytes[j / 4]));
    }
  };
  template <int j, int group>
  static V::I weights(const uint8_t* words) {
    constexpr int half = j / 8;
    constexpr int quarter = (j % 8) / 2;         // 32 columns: which nibble half and which bit pair
    constexpr int word = (j % 2) * 4 + group;    // within those 32 columns
    const V::I ql = V::load_i(words + (half * 16 + (quarter % 2) * 8 + word) * 64);
    const V::I qh = V::load_i(words + (32 + half * 8 + word) * 64);
    const V::I low = V::and_i(quarter < 2 ? ql : V::template shift_right<4>(ql), V::set_i(0x0f0f0f0f));
    const V::I high = V::and_i(V::template shift_right<2 * quarter>(qh), V::set_i(0x03030303));
    return V::or_i(low, V::template shift_left<4>(high));
  }
};

// Groups of 4 columns of sub-block j.
template <class Words, int T, int R, int j, int group>
TKT_INLINE void add_groups_k(V::I (&dot)[T][R], V::I (&narrow)[T][R], const uint8_t* const (&words)[R],
                             const ActivationQ8* const (&act)[T]) {
  constexpr int kGroups = Words::kSubColumns / 4;
  constexpr int kColumn = j * Words::kSubColumns + 4 * group;
  V::I w[R];
  prefetch_ahead<Words::kWords, 64, kColumn / 4, T>(words);
  TKT_UNROLL for (int r = 0; r < R; ++r) w[r] = Words::template weights<j, group>(words[r]);
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    const V::I a = V::broadcast_i(act[t][kColumn / 32].q + kColumn % 32);
    TKT_UNROLL for (int r = 0; r < R; ++r) {
      accumulate<Words::kNarrowGroups, group, kGroups>(dot[t][r], narrow[t][r], w[r], a);
    }
  }
  if constexpr (group + 1 < kGroups) add_groups_k<Words, T, R, j, group + 1>(dot, narrow, words, act);
}

// sums += scale of j * dot of j, up to the end of an activation block. Bounds: a sub-block of 32 gives at most
// 32 * 31 * 127 * 63 < 2^23; two of 16 in Q6_K give 2 * 16 * 32 * 127 * 128 < 2^24.
template <class Words, int T, int R, int j>
TKT_INLINE void add_sub_blocks(V::I (&sums)[T][R], const typename Words::Scales (&scales)[R],
                               const uint8_t* const (&words)[R], const ActivationQ8* const (&act)[T]) {
  constexpr int kColumn = j * Words::kSubColumns;
  V::I dot[T][R];
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    V::I start = V::set_i(0);
    if constexpr (Words::kOffsetLog2 >= 0) {
      start = V::template shift_left<Words::kOffsetLog2>(
          V::broadcast_i(&act[t][kColumn / 32].neg_sum16[kColumn % 32 / 16]));
    }
    TKT_UNROLL for (int r = 0; r < R; ++r) dot[t][r] = start;
  }
  V::I narrow[T][R];
  add_groups_k<Words, T, R, j, 0>(dot, narrow, words, act);
  TKT_UNROLL for (int r = 0; r < R; ++r) {
    const V::I scale = scales[r].template scale<j>();
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      const V::I product = V::mul_i(dot[t][r], scale);
      sums[t][r] = kColumn % 32 == 0 ? product : V::add_i(sums[t][r], product);
    }
  }
  if constexpr ((kColumn + Words::kSubColumns) % 32 != 0) add_sub_blocks<Words, T, R, j + 1>(sums, scales, words, act);
}

template <class Words, int T, int R, int block>
TKT_INLINE void add_blocks(V::F (&scaled)[T][R], const typename Words::Scales (&scales)[R],
                           const uint8_t* const (&words)[R], const ActivationQ8* const (&act)[T]) {
  V::I sums[T][R];
  add_sub_blocks<Words, T, R, block * 32 / Words::kSubColumns>(sums, scales, words, act);
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    const V::F d = V::set_f(act[t][block].d);
    TKT_UNROLL for (int r = 0; r < R; ++r) scaled[t][r] = V::fma(V::to_float(sums[t][r]), d, scaled[t][r]);
  }
  if constexpr (block < 7) add_blocks<Words, T, R, block + 1>(scaled, scales, words, act);
}

template <class Scales, int T, int j>
TKT_INLINE void add_minima(V::F (&minima)[T], const Scales& scales, const ActivationQ8* const (&act)[T]) {
  const V::F min = scales.template min<j>();
  TKT_UNROLL for (int t = 0; t < T; ++t) minima[t] = V::fma(min, V::set_f(act[t][j].d_sum), minima[t]);
  if constexpr (j < 7) add_minima<Scales, T, j + 1>(minima, scales, act);
}

template <class Words, int T, int R>
static inline void dot_tile_k(const DotArgs& args, int token) {
  using Scales = typename Words::Scales;
  V::F acc[T][R];
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    TKT_UNROLL for (int r = 0; r < R; ++r) acc[t][r] = V::zero_f();
  }
  const int64_t separate_scales = args.blocks * Words::kWords * 64;
  // A second, short stream, whose every line is needed at the start of a block: fetched before the first.
  if constexpr (Words::kHasSeparateScales) {
    for (int64_t b = 0; b < args.blocks; b += 2) {
      TKT_UNROLL for (int r = 0; r < R; ++r) V::prefetch(args.panels[r] + separate_scales + b * 32);
    }
  }
  for (int64_t b = 0; b < args.blocks; ++b) {
    const uint8_t* words[R];
    Scales scales[R];
    TKT_UNROLL for (int r = 0; r < R; ++r) {
      words[r] = args.panels[r] + b * Words::kWords * 64;
      scales[r].read(words[r], args.panels[r] + separate_scales + b * 32);
    }
    const ActivationQ8* act[T];
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      act[t] = reinterpret_cast<const ActivationQ8*>(args.activations[token + t]) + b * 8;
    }
    V::F scaled[T][R];
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      TKT_UNROLL for (int r = 0; r < R; ++r) scaled[t][r] = V::zero_f();
    }
    add_blocks<Words, T, R, 0>(scaled, scales, words, act);
    TKT_UNROLL for (int r = 0; r < R; ++r) {
      TKT_UNROLL for (int t = 0; t < T; ++t) acc[t][r] = V::fma(scales[r].d, scaled[t][r], acc[t][r]);
      // A pass of its own: beside the products, the sums of minima would cost registers that the products need.
      if constexpr (Scales::kHasMinima) {
        V::F minima[T];
        TKT_UNROLL for (int t = 0; t < T; ++t) minima[t] = V::zero_f();
        add_minima<Scales, T, 0>(minima, scales[r], act);
        TKT_UNROLL for (int t = 0; t < T; ++t) acc[t][r] = V::fnma(scales[r].dmin, minima[t], acc[t][r]);
      }
    }
  }
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    TKT_UNROLL for (int r = 0; r < R; ++r) V::store(args.out + (token + t) * 32 + r * 16, acc[t][r]);
  }
}

// ---- Float types: one fma per column. ------------------------------------------------------------------------------

struct F32Words {
  static constexpr int kBytes = 64;
  static V::F weights(const uint8_t* p) { return V::load(reinterpret_cast<const float*>(p)); }
};
struct F16Words {
  static constexpr int kBytes = 32;
  static V::F weights(const uint8_t* p) { return V::load_f16(p); }
};
struct BF16Words {
  static constexpr int kBytes = 32;
  static V::F weights(const uint8_t* p) { return V::load_bf16(p); }
};

template <class Words, int T, int R>
static inline void dot_tile_float(const DotArgs& args, int token) {
  V::F acc[T][R];
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    TKT_UNROLL for (int r = 0; r < R; ++r) acc[t][r] = V::zero_f();
  }
  const float* act[T];
  TKT_UNROLL for (int t = 0; t < T; ++t) act[t] = reinterpret_cast<const float*>(args.activations[token + t]);
  for (int64_t column = 0; column < args.blocks; ++column) {
    V::F w[R];
    TKT_UNROLL for (int r = 0; r < R; ++r) w[r] = Words::weights(args.panels[r] + column * Words::kBytes);
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      const V::F x = V::set_f(act[t][column]);
      TKT_UNROLL for (int r = 0; r < R; ++r) acc[t][r] = V::fma(w[r], x, acc[t][r]);
    }
  }
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    TKT_UNROLL for (int r = 0; r < R; ++r) V::store(args.out + (token + t) * 32 + r * 16, acc[t][r]);
  }
}

// ---- Tiling over tokens -------------------------------------------------------------------------------------------

static inline DotArgs one_panel(const DotArgs& args, int panel) {
  return {{args.panels[panel], nullptr}, 1, args.blocks, args.activations, args.tokens, args.out + panel * 16};
}

// One token is bound by memory, and memory likes one stream: quantized panels are then read one after the other (Q4_K on
// one core of Zen 5: 30 GB/s instead of 23). Floats keep two, because a single chain of fma reaches 26 GB/s of F16.
#define TKT_DEFINE_DOT(function, tile, words, panels_for_one_token)                \
  template <int T, int R>                                                          \
  static inline int function##_tiles(const DotArgs& args, int token) {             \
    for (; token + T <= args.tokens; token += T) tile<words, T, R>(args, token);   \
    return token;                                                                  \
  }                                                                                \
  template <int R>                                                                 \
  static inline void function##_panels(const DotArgs& args) {                      \
    int token = 0;                                                                 \
    token = function##_tiles<V::kTileTokens, R>(args, token);                      \
    if constexpr (V::kTileTokens > 4) token = function##_tiles<4, R>(args, token); \
    if constexpr (V::kTileTokens > 2) token = function##_tiles<2, R>(args, token); \
    function##_tiles<1, R>(args, token);                                           \
  }                                                                                \
  static void function(const DotArgs& args) {                                      \
    const int at_once = args.tokens == 1 ? panels_for_one_token : V::kTilePanels;  \
    if (args.panel_count == 1) {                                                   \
      function##_panels<1>(args);                                                  \
    } else if (at_once == 2) {                                                     \
      function##_panels<2>(args);                                                  \
    } else {                                                                       \
      function##_panels<1>(one_panel(args, 0));                                    \
      function##_panels<1>(one_panel(args, 1));                                    \
    }                                                                              \
  }

TKT_DEFINE_DOT(dot_f32, dot_tile_float, F32Words, 2)
TKT_DEFINE_DOT(dot_f16, dot_tile_float, F16Words, 2)
TKT_DEFINE_DOT(dot_bf16, dot_tile_float, BF16Words, 2)
TKT_DEFINE_DOT(dot_q4_0, dot_tile_32, Q4_0Words, 1)
TKT_DEFINE_DOT(dot_q5_0, dot_tile_32, Q5_0Words, 1)
TKT_DEFINE_DOT(dot_q8_0, dot_tile_32, Q8_0Words, 1)
TKT_DEFINE_DOT(dot_q4_k, dot_tile_k, Q4_KWords, 1)
TKT_DEFINE_DOT(dot_q5_k, dot_tile_k, Q5_KWords, 1)
TKT_DEFINE_DOT(dot_q6_k, dot_tile_k, Q6_KWords, 1)

#undef TKT_DEFINE_DOT
