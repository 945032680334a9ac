// The dot and gemv functions of a KernelTable: which of the loop nests of panel_dot-inl.h and panel_dot_unpacked-inl.h
// a type takes for how many tokens. Rules as for those, which come before it.

// ---- One token ------------------------------------------------------------------------------------------------------

// One token is bound by memory, and memory likes one stream: quantized panels are read one after the other (Q4_K on one
// core of Zen 5: 30 GB/s instead of 23). Floats are read two at a time, because a single chain of fma reaches 26 GB/s
// of F16.
template <class Words, Prefetch prefetch>
static inline void gemv_prefetching(const GemvArgs& args) {
  constexpr int kAtOnce = Words::kColumns == 1 ? 2 : 1;
  for (int64_t p = 0; p < args.panel_count; p += kAtOnce) {
    const uint8_t* panel = args.panels + p * args.panel_bytes;
    float* out = args.out + p * 16;
    if constexpr (Words::kColumns == 256) {
      dot_one_panel_k<Words>(panel, args.blocks, args.activations, out, prefetch);
    } else {
      const DotArgs tile{{panel, panel + args.panel_bytes}, kAtOnce, args.blocks, &args.activations, 1, out, prefetch};
      if (p + kAtOnce <= args.panel_count) {
        dot_tile<Words, 1, kAtOnce>(tile, 0, prefetch);
      } else {
        dot_tile<Words, 1, 1>(tile, 0, prefetch);
      }
    }
  }
}

template <class Words>
static void gemv(const GemvArgs& args) {
  switch (args.prefetch) {
    case Prefetch::kHardware:
      return gemv_prefetching<Words, Prefetch::kHardware>(args);
    case Prefetch::kPerLine:
      return gemv_prefetching<Words, Prefetch::kPerLine>(args);
    case Prefetch::kBursts:
      return gemv_prefetching<Words, Prefetch::kBursts>(args);
  }
}

// ---- Few tokens: in as few tiles as there can be, which share the tokens evenly (7 = 3 + 4, so that none has just one
// and unpacks weights for it alone). Only the first prefetches: the others find the panels in L2.
// -------------------------------

// A function of its own for each size: compilers take far longer over one that holds them all. Per line is a constant,
// because a branch at each line costs what prefetching gives.
template <class Words, int T, int R>
TKT_NOINLINE void dot_tile_per_line(const DotArgs& args, int token) {
  dot_tile<Words, T, R>(args, token, Prefetch::kPerLine);
}
template <class Words, int T, int R>
TKT_NOINLINE void dot_tile_otherwise(const DotArgs& args, int token, bool bursts) {
  dot_tile<Words, T, R>(args, token, bursts ? Prefetch::kBursts : Prefetch::kHardware);
}

// The smallest tile that holds `tokens`.
template <class Words, int R, int T>
static void dot_few_tile(const DotArgs& args, int token, int tokens, Prefetch prefetch) {
  if constexpr (T > 2) {
    if (tokens < T) return dot_few_tile<Words, R, T - 1>(args, token, tokens, prefetch);
  }
  if constexpr (T <= Words::kPerLineTokens) {
    if (prefetch == Prefetch::kPerLine) return dot_tile_per_line<Words, T, R>(args, token);
  }
  dot_tile_otherwise<Words, T, R>(args, token, prefetch == Prefetch::kBursts);
}

template <class Words, int R>
static inline void dot_few(const DotArgs& args, Prefetch prefetch) {
  constexpr int kTokens = Words::kColumns == 256 ? 4 : V::kTileTokens;
  const int tiles = (args.tokens + kTokens - 1) / kTokens;
  int token = 0;
  for (int i = 1; i <= tiles; ++i) {
    const int end = args.tokens * i / tiles;
    dot_few_tile<Words, R, kTokens>(args, token, end - token, i == 1 ? prefetch : Prefetch::kHardware);
    token = end;
  }
}

// ---- Any number -----------------------------------------------------------------------------------------------------

template <class Words>
static void dot(const DotArgs& args) {
  if (args.tokens == 1) {
    for (int p = 0; p < args.panel_count; ++p) {
      constexpr int64_t kNoNextPanel = 0;
      gemv<Words>(
          {args.panels[p], 1, kNoNextPanel, args.blocks, args.activations[0], args.out + p * 16, args.prefetch});
    }
    return;
  }
  if constexpr (Words::kUnpacks) {
    if (args.tokens >= unpack_tokens<Words>()) return dot_many<Words>(args);
  }
  if (args.panel_count == 2 && V::kTilePanels == 2) {
    dot_few<Words, V::kTilePanels>(args, args.prefetch);
  } else {
    for (int p = 0; p < args.panel_count; ++p) dot_few<Words, 1>(one_panel(args, p), args.prefetch);
  }
}
