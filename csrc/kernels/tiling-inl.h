// The dot functions of a KernelTable: which of the loop nests of panel_dot-inl.h and panel_dot_unpacked-inl.h a type takes
// for how many tokens. Rules as for those, which come before it.

// From 2 tokens on: in as few tiles as there can be, which share the tokens evenly (7 = 3 + 4, so that none has just one and
// unpacks weights for it alone). Only the first has lines asked for ahead: the others find the panels in L2. In place it needs
// `how` to be a constant, for a branch at each line would cost what it gives.
#define TKT_DEFINE_FEW(function, tile, words, tile_tokens)                                                   \
  template <int R, int T>                                                                                    \
  TKT_INLINE void function##_tile(const DotArgs& args, int token, int tokens, LookAhead how) {               \
    if constexpr (T > 2) {                                                                                   \
      if (tokens < T) return function##_tile<R, T - 1>(args, token, tokens, how);                            \
    }                                                                                                        \
    if (T <= words::kInPlaceTokens && how == LookAhead::kInPlace) {                                          \
      tile<words, T, R>(args, token, LookAhead::kInPlace);                                                   \
    } else {                                                                                                 \
      tile<words, T, R>(args, token, how == LookAhead::kBursts ? LookAhead::kBursts : LookAhead::kHardware); \
    }                                                                                                        \
  }                                                                                                          \
  template <int R>                                                                                           \
  static inline void function##_panels(const DotArgs& args, LookAhead how) {                                 \
    const int tiles = (args.tokens + tile_tokens - 1) / tile_tokens;                                         \
    int token = 0;                                                                                           \
    for (int i = 1; i <= tiles; ++i) {                                                                       \
      const int end = args.tokens * i / tiles;                                                               \
      function##_tile<R, tile_tokens>(args, token, end - token, i == 1 ? how : LookAhead::kHardware);        \
      token = end;                                                                                           \
    }                                                                                                        \
  }                                                                                                          \
  static void function(const DotArgs& args) {                                                                \
    const LookAhead how = look_ahead(V::kLookAhead);                                                         \
    if (args.panel_count == 2 && V::kTilePanels == 2) {                                                      \
      function##_panels<V::kTilePanels>(args, how);                                                          \
    } else {                                                                                                 \
      for (int p = 0; p < args.panel_count; ++p) function##_panels<1>(one_panel(args, p), how);              \
    }                                                                                                        \
  }

// Calls what needs to know at compile time how a product of one token looks ahead.
#define TKT_CALL_LOOKING_AHEAD(function)           \
  switch (look_ahead(V::kLookAhead)) {             \
    case LookAhead::kHardware:                     \
      return function<LookAhead::kHardware>(args); \
    case LookAhead::kInPlace:                      \
      return function<LookAhead::kInPlace>(args);  \
    case LookAhead::kBursts:                       \
      return function<LookAhead::kBursts>(args);   \
  }

// One token is bound by memory, and memory likes one stream: quantized panels are then read one after the other (Q4_K on
// one core of Zen 5: 30 GB/s instead of 23). Floats keep two, because a single chain of fma reaches 26 GB/s of F16.
#define TKT_DEFINE_DOT(function, tile, words, tile_tokens, panels_for_one_token)                \
  TKT_DEFINE_FEW(function##_few, tile, words, tile_tokens)                                      \
  template <LookAhead how>                                                                      \
  static inline void function##_one(const DotArgs& args) {                                      \
    if (panels_for_one_token == 2 && args.panel_count == 2) {                                   \
      tile<words, 1, panels_for_one_token>(args, 0, how);                                       \
    } else {                                                                                    \
      for (int p = 0; p < args.panel_count; ++p) tile<words, 1, 1>(one_panel(args, p), 0, how); \
    }                                                                                           \
  }                                                                                             \
  static void function(const DotArgs& args) {                                                   \
    if (args.tokens > 1) return function##_few(args);                                           \
    TKT_CALL_LOOKING_AHEAD(function##_one)                                                      \
  }

#define TKT_DEFINE_NIBBLE_DOT(function, words)                                 \
  TKT_DEFINE_DOT(function##_packed, dot_tile_32, words, V::kTileTokens, 1)     \
  static void function(const DotArgs& args) {                                  \
    if constexpr (V::kUnpacks32Wide) {                                         \
      if (args.tokens >= unpack_tokens<words>()) return dot_many<words>(args); \
    }                                                                          \
    function##_packed(args);                                                   \
  }

#define TKT_DEFINE_K_QUANT_DOT(function, words)                              \
  TKT_DEFINE_FEW(function##_few, dot_tile_k, words, 4)                       \
  template <LookAhead how>                                                   \
  static inline void function##_one(const DotArgs& args) {                   \
    dot_one_k<words, how>(args);                                             \
  }                                                                          \
  static void function(const DotArgs& args) {                                \
    if (args.tokens >= unpack_tokens<words>()) return dot_many<words>(args); \
    if (args.tokens > 1) return function##_few(args);                        \
    TKT_CALL_LOOKING_AHEAD(function##_one)                                   \
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
#undef TKT_CALL_LOOKING_AHEAD
#undef TKT_DEFINE_FEW
