// The dot functions of a KernelTable: which of the loop nests of panel_dot-inl.h and panel_dot_unpacked-inl.h a type takes
// for how many tokens. Rules as for those, which come before it.

// From 2 tokens on.
#define TKT_DEFINE_FEW(function, tile, words, tile_tokens)                                 \
  template <int T, int R>                                                                  \
  static inline int function##_tiles(const DotArgs& args, int token) {                     \
    for (; token + T <= args.tokens; token += T) {                                         \
      const bool asks = T > 1 && token == 0 && software_prefetch_pays();                   \
      tile<words, T, R>(args, token, asks ? kAheadBytes : 0);                              \
    }                                                                                      \
    return token;                                                                          \
  }                                                                                        \
  template <int R>                                                                         \
  static inline void function##_panels(const DotArgs& args) {                              \
    int token = 0;                                                                         \
    token = function##_tiles<tile_tokens, R>(args, token);                                 \
    if constexpr (tile_tokens > 4) token = function##_tiles<4, R>(args, token);            \
    if constexpr (tile_tokens > 2) token = function##_tiles<2, R>(args, token);            \
    function##_tiles<1, R>(args, token);                                                   \
  }                                                                                        \
  static void function(const DotArgs& args) {                                              \
    if (args.panel_count == 2 && V::kTilePanels == 2) {                                    \
      function##_panels<V::kTilePanels>(args);                                             \
    } else {                                                                               \
      for (int p = 0; p < args.panel_count; ++p) function##_panels<1>(one_panel(args, p)); \
    }                                                                                      \
  }

// One token is bound by memory, and memory likes one stream: quantized panels are then read one after the other (Q4_K on
// one core of Zen 5: 30 GB/s instead of 23). Floats keep two, because a single chain of fma reaches 26 GB/s of F16.
#define TKT_DEFINE_DOT(function, tile, words, tile_tokens, panels_for_one_token)                  \
  TKT_DEFINE_FEW(function##_few, tile, words, tile_tokens)                                        \
  template <int64_t ahead>                                                                        \
  static inline void function##_one(const DotArgs& args) {                                        \
    if (panels_for_one_token == 2 && args.panel_count == 2) {                                     \
      tile<words, 1, panels_for_one_token>(args, 0, ahead);                                       \
    } else {                                                                                      \
      for (int p = 0; p < args.panel_count; ++p) tile<words, 1, 1>(one_panel(args, p), 0, ahead); \
    }                                                                                             \
  }                                                                                               \
  static void function(const DotArgs& args) {                                                     \
    if (args.tokens > 1) {                                                                        \
      function##_few(args);                                                                       \
    } else if (software_prefetch_pays()) {                                                        \
      function##_one<kAheadBytes>(args);                                                          \
    } else {                                                                                      \
      function##_one<0>(args);                                                                    \
    }                                                                                             \
  }

#define TKT_DEFINE_NIBBLE_DOT(function, words)                             \
  TKT_DEFINE_DOT(function##_packed, dot_tile_32, words, V::kTileTokens, 1) \
  static void function(const DotArgs& args) {                              \
    if constexpr (V::kUnpacks32Wide) {                                     \
      if (args.tokens >= kUnpackTokens) return dot_many<words>(args);      \
    }                                                                      \
    function##_packed(args);                                               \
  }

#define TKT_DEFINE_K_QUANT_DOT(function, words)        \
  TKT_DEFINE_FEW(function##_few, dot_tile_k, words, 4) \
  static void function(const DotArgs& args) {          \
    if (args.tokens >= kUnpackTokens) {                \
      dot_many<words>(args);                           \
    } else if (args.tokens > 1) {                      \
      function##_few(args);                            \
    } else if (software_prefetch_pays()) {             \
      dot_one_k<words, kAheadBytes>(args);             \
    } else {                                           \
      dot_one_k<words, 0>(args);                       \
    }                                                  \
  }

TKT_DEFINE_DOT(dot_f32, dot_tile_float, F32Words, V::kTileTokens, 2)
TKT_DEFINE_DOT(dot_f16, dot_tile_float, F16Words, V::kTileTokens, 2)
TKT_DEFINE_DOT(dot_bf16, dot_tile_float, BF16Words, V::kTileTokens, 2)
TKT_DEFINE_NIBBLE_DOT(dot_q4_0, Q4_0Words)
TKT_DEFINE_NIBBLE_DOT(dot_q5_0, Q5_0Words)
TKT_DEFINE_DOT(dot_q8_0, dot_tile_32, Q8_0Words, V::kTileTokens, 1)
TKT_DEFINE_K_QUANT_DOT(dot_q4_k, Q4_KWords)
TKT_DEFINE_K_QUANT_DOT(dot_q5_k, Q5_KWords)
TKT_DEFINE_K_QUANT_DOT(dot_q6_k, Q6_KWords)

#undef TKT_DEFINE_K_QUANT_DOT
#undef TKT_DEFINE_NIBBLE_DOT
#undef TKT_DEFINE_DOT
#undef TKT_DEFINE_FEW
