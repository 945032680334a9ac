// Products of many tokens, of types that must be unpacked: 256 columns of a panel become bytes in L1 once, and every
// tile of tokens runs over them; between blocks the sums wait in the caller's `out`. Rules as for panel_dot-inl.h,
// which comes before it.
//
// Dot products, multiplications and fma share two pipes of a core of Zen 5: per 32 columns of an output, Q4_K and Q5_K
// need 8 dot products, a product with the scale, and an fma each for the sum and for the minimum, Q6_K two products and
// one fma. So this order of work can reach 71% of the dot products' peak (1,008 GOPS). Measured at 64 tokens, 7,168
// columns, with every tile unpacking for itself and so: Q4_K 580 and 650 GOPS, Q5_K 510 and 645, Q6_K 470 and 620.
// 32-wide types need less unpacking, so that only 16 registers make it pay (V::kUnpacks32Wide).

// From how many tokens on it pays. With 32 registers: two cores of Zen 4, weights from memory, 6 tokens Q4_K 345 and
// 250, Q6_K 335 and 225, 12 the same within noise. With 16, where tiles that unpack for themselves run out of them: two
// cores of Zen 3, against those, 3, 4, 5, 6, 8 and 10 tokens Q4_K 0.92, 0.88, 1.06, 1.12, 1.06, 1.24; Q5_K 0.97, 1.00,
// 1.36, 1.19, 1.23, 1.40; Q6_K 1.10, 1.36, 1.28, 1.47, 1.83, 1.84; Q5_0 0.84, 0.85, 0.88, 0.92, 1.03, 1.07; Q4_0 0.81,
// 0.78, 0.77, 0.83, 0.93, 0.91. With 16 and VNNI it has not been measured, hence kFoldsScales, which is AVX2 alone.
template <class Words>
constexpr int unpack_tokens() {
  return V::kFoldsScales ? Words::kUnpackTokensOf16Registers : 12;
}
constexpr int kUnpackPassTokens = 96;  // as fast as 64, and the experts of a prompt of 512 rarely have more

template <int R>
struct UnpackedBlock {
  alignas(64) uint8_t weights[8][8][R][64];  // of 32 columns, of 4 columns
  // Of 32 columns, of 16 in Q6_K: floats; in K-quants where V::kFoldsScales, pairs of 16 bits.
  alignas(64) uint8_t scales[8][2][R][64];
  // Of Q6_K where V::kFoldsScales: the scales of both halves times the offset, as a pair.
  alignas(64) uint8_t offset_scales[8][R][64];
  alignas(64) uint8_t minima[8][R][64];  // of 32 columns: floats; of Q2_K pairs of 16 bits
  alignas(64) float d[R][16];
  alignas(64) float dmin[R][16];
};

TKT_INLINE void store_float(uint8_t* p, V::F x) { V::store(reinterpret_cast<float*>(p), x); }
TKT_INLINE V::F load_float(const uint8_t* p) { return V::load(reinterpret_cast<const float*>(p)); }
TKT_INLINE void store_minimum(uint8_t* p, V::F x) { store_float(p, x); }
TKT_INLINE void store_minimum(uint8_t* p, V::I x) { V::store_i(p, x); }
template <class Words>
TKT_INLINE auto load_minimum(const uint8_t* p) {
  if constexpr (Words::kSubColumns == 16) {
    return V::load_i(p);
  } else {
    return load_float(p);
  }
}

// As add_groups_k: kGroups groups of 4 columns, from group kFirst of the 32 columns.
template <int kNarrowGroups, int T, int R, int kFirst, int kGroups, int group>
TKT_INLINE void add_unpacked_groups(V::I (&dot)[T][R], V::I (&narrow)[T][R], const uint8_t (&weights)[8][R][64],
                                    const int8_t* const (&q)[T], const V::I (&factors)[R]) {
  V::I w[R];
  TKT_UNROLL for (int r = 0; r < R; ++r) w[r] = V::load_i(weights[kFirst + group][r]);
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    const V::I a = V::broadcast_i(q[t] + 4 * (kFirst + group));
    TKT_UNROLL for (int r = 0; r < R; ++r) {
      accumulate<kNarrowGroups, group, kGroups>(dot[t][r], narrow[t][r], w[r], a, factors[r]);
    }
  }
  if constexpr (group + 1 < kGroups) {
    add_unpacked_groups<kNarrowGroups, T, R, kFirst, kGroups, group + 1>(dot, narrow, weights, q, factors);
  }
}

// ---- K-quants ------------------------------------------------------------------------------------------------------

// Groups of 4 columns of both blocks of a chunk, to where a block's first group of this panel stands.
template <class Words, int R, int group>
TKT_INLINE void unpack_groups(uint8_t* low, uint8_t* high, const uint8_t* chunk) {
  const uint8_t* set = set_of<Words>(chunk, 0, group);
  V::store_i(low + group * R * 64, Words::template weights<2 * (group % Words::kSetGroups)>(set));
  V::store_i(high + group * R * 64, Words::template weights<2 * (group % Words::kSetGroups) + 1>(set));
  if constexpr (group < 7) unpack_groups<Words, R, group + 1>(low, high, chunk);
}

template <class Words, int R, int j>
TKT_INLINE void unpack_scales(UnpackedBlock<R>& unpacked, int r, const typename Words::Scales& scales) {
  constexpr int kColumn = j * Words::kSubColumns;
  constexpr int kBlock = kColumn / 32;
  const V::I scale = scales.template scale<j>();
  uint8_t* place = unpacked.scales[kBlock][kColumn % 32 / 16][r];
  if constexpr (V::kFoldsScales) {
    V::store_i(place, pair_of(scale, scale));
    if constexpr (Words::kOffsetLog2 >= 0 && kColumn % 32 == 0) {
      constexpr int kOffsetLog2 = Words::kOffsetLog2;
      V::store_i(unpacked.offset_scales[kBlock][r],
                 pair_of(V::template shift_left<kOffsetLog2>(scale),
                         V::template shift_left<kOffsetLog2>(scales.template scale<j + 1>())));
    }
  } else {
    store_float(place, V::to_float(scale));
  }
  if constexpr (Words::Scales::kHasMinima && kColumn % 32 == 0) {
    store_minimum(unpacked.minima[kBlock][r], scales.template min<kBlock>());
  }
  if constexpr (kColumn + Words::kSubColumns < 256) unpack_scales<Words, R, j + 1>(unpacked, r, scales);
}

template <class Words, int R>
TKT_NOINLINE void unpack_block(const DotArgs& args, int64_t block, UnpackedBlock<R>& unpacked) {
  constexpr int kChunkBytes = 8 / Words::kSetGroups * Words::kSetWords * 64;
  for (int r = 0; r < R; ++r) {
    const uint8_t* words = block_words<Words>(args.panels[r], args.blocks, block);
    typename Words::Scales scales;
    scales.read(words, block_scales<Words>(args.panels[r], block));
    V::store(unpacked.d[r], scales.d);
    if constexpr (Words::Scales::kHasMinima) V::store(unpacked.dmin[r], scales.dmin);
    unpack_scales<Words, R, 0>(unpacked, r, scales);
    for (int chunk = 0; chunk < 4; ++chunk) {
      unpack_groups<Words, R, 0>(unpacked.weights[Words::block_of(chunk, 0)][0][r],
                                 unpacked.weights[Words::block_of(chunk, 1)][0][r], words + chunk * kChunkBytes);
    }
  }
}

// As add_sub_blocks, for 32 columns of the block.
template <class Words, int T, int R, int half>
TKT_INLINE void add_unpacked_halves(V::F (&sums)[T][R], const UnpackedBlock<R>& unpacked, int b,
                                    const ActivationQ8* const (&act)[T]) {
  constexpr int kGroups = Words::kSubColumns / 4;
  V::I dot[T][R];
  const int8_t* q[T];
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    q[t] = act[t][b].q;
    V::I start = V::set_i(0);
    if constexpr (Words::kOffsetLog2 >= 0) {
      start = V::template shift_left<Words::kOffsetLog2>(V::broadcast_i(neg_sum_of<Words>(act[t][b], half)));
    }
    TKT_UNROLL for (int r = 0; r < R; ++r) dot[t][r] = start;
  }
  V::I narrow[T][R];
  V::I factors[R];
  TKT_UNROLL for (int r = 0; r < R; ++r) factors[r] = V::set_i(kOnes);
  add_unpacked_groups<Words::kNarrowGroups, T, R, half * kGroups, kGroups, 0>(dot, narrow, unpacked.weights[b], q,
                                                                              factors);
  TKT_UNROLL for (int r = 0; r < R; ++r) {
    const V::F scale = load_float(unpacked.scales[b][half][r]);
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      const V::F of_half = V::to_float(dot[t][r]);
      sums[t][r] = half == 0 ? V::mul(of_half, scale) : V::fma(of_half, scale, sums[t][r]);
    }
  }
  if constexpr ((half + 1) * Words::kSubColumns < 32) {
    add_unpacked_halves<Words, T, R, half + 1>(sums, unpacked, b, act);
  }
}

// The same sums, which are exact either way, where sums of 16 bits are widened by a multiplication: it takes the scale
// along. Sums of Q6_K stay under 4 * 2 * 32,004 * 128 = 2^25 on the way to less than 2^24.
template <class Words, int T, int R, int half>
TKT_INLINE void add_folded_halves(V::I (&dot)[T][R], const UnpackedBlock<R>& unpacked, int b,
                                  const int8_t* const (&q)[T]) {
  constexpr int kGroups = Words::kSubColumns / 4;
  V::I narrow[T][R];
  V::I factors[R];
  TKT_UNROLL for (int r = 0; r < R; ++r) factors[r] = V::load_i(unpacked.scales[b][half][r]);
  add_unpacked_groups<Words::kNarrowGroups, T, R, half * kGroups, kGroups, 0>(dot, narrow, unpacked.weights[b], q,
                                                                              factors);
  if constexpr ((half + 1) * Words::kSubColumns < 32) add_folded_halves<Words, T, R, half + 1>(dot, unpacked, b, q);
}

template <class Words, int T, int R, class Isa = V>
TKT_INLINE void add_unpacked_block(V::F (&sums)[T][R], const UnpackedBlock<R>& unpacked, int b,
                                   const ActivationQ8* const (&act)[T]) {
  if constexpr (!V::kFoldsScales) {
    add_unpacked_halves<Words, T, R, 0>(sums, unpacked, b, act);
  } else {
    V::I dot[T][R];
    const int8_t* q[T];
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      q[t] = act[t][b].q;
      TKT_UNROLL for (int r = 0; r < R; ++r) dot[t][r] = V::set_i(0);
    }
    add_folded_halves<Words, T, R, 0>(dot, unpacked, b, q);
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      TKT_UNROLL for (int r = 0; r < R; ++r) {
        if constexpr (Words::kOffsetLog2 >= 0) {
          const V::I neg_sums = Isa::broadcast_pair(act[t][b].neg_sum16);
          dot[t][r] = V::add_i(dot[t][r], Isa::widen_pairs(neg_sums, V::load_i(unpacked.offset_scales[b][r])));
        }
        sums[t][r] = V::to_float(dot[t][r]);
      }
    }
  }
}

template <class Words, int T, int R>
TKT_NOINLINE void dot_tile_unpacked_k(const UnpackedBlock<R>& unpacked, const DotArgs& args, int64_t block,
                                       int token) {
  const ActivationQ8* act[T];
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    act[t] = reinterpret_cast<const ActivationQ8*>(args.activations[token + t]) + block * 8;
  }
  V::F acc[T][R];
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    TKT_UNROLL for (int r = 0; r < R; ++r) acc[t][r] = V::zero_f();
  }
  for (int b = 0; b < 8; ++b) {
    V::F sums[T][R];
    add_unpacked_block<Words, T, R>(sums, unpacked, b, act);
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      const V::F d = V::set_f(act[t][b].d);
      TKT_UNROLL for (int r = 0; r < R; ++r) acc[t][r] = V::fma(sums[t][r], d, acc[t][r]);
    }
  }
  TKT_UNROLL for (int r = 0; r < R; ++r) {
    const V::F d = V::load(unpacked.d[r]);
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      const V::F before = block == 0 ? V::zero_f() : V::load(args.out + (token + t) * 32 + r * 16);
      acc[t][r] = V::fma(d, acc[t][r], before);
    }
  }
  if constexpr (Words::Scales::kHasMinima) {
    V::F minima[T][R];
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      TKT_UNROLL for (int r = 0; r < R; ++r) minima[t][r] = V::zero_f();
    }
    TKT_UNROLL for (int b = 0; b < 8; ++b) {
      TKT_UNROLL for (int r = 0; r < R; ++r) {
        const auto min = load_minimum<Words>(unpacked.minima[b][r]);
        TKT_UNROLL for (int t = 0; t < T; ++t) minima[t][r] = with_minimum(min, act[t][b], minima[t][r]);
      }
    }
    TKT_UNROLL for (int r = 0; r < R; ++r) {
      const V::F dmin = V::load(unpacked.dmin[r]);
      TKT_UNROLL for (int t = 0; t < T; ++t) acc[t][r] = V::fnma(dmin, minima[t][r], acc[t][r]);
    }
  }
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    TKT_UNROLL for (int r = 0; r < R; ++r) V::store(args.out + (token + t) * 32 + r * 16, acc[t][r]);
  }
}

// ---- 32-wide types --------------------------------------------------------------------------------------------------

template <class Words, int R, int position>
TKT_INLINE void unpack_groups_32(UnpackedBlock<R>& unpacked, int b, int r, const uint8_t* words) {
  V::store_i(unpacked.weights[b][Words::group_at(position)][r], Words::template weights<position>(words));
  if constexpr (position < 7) unpack_groups_32<Words, R, position + 1>(unpacked, b, r, words);
}

template <class Words, int R>
static inline void unpack_blocks_32(const DotArgs& args, int64_t block, int count, UnpackedBlock<R>& unpacked) {
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < count; ++b) {
      const uint8_t* scales = block_scales<Words>(args.panels[r], block + b);
      store_float(unpacked.scales[b][0][r], Words::load_scales(scales));
      if constexpr (Words::kHasMinima) store_float(unpacked.minima[b][r], Words::load_minima(scales));
      unpack_groups_32<Words, R, 0>(unpacked, b, r, block_words<Words>(args.panels[r], args.blocks, block + b));
    }
  }
}

template <class Words, int T, int R>
TKT_NOINLINE void dot_tile_unpacked_32(const UnpackedBlock<R>& unpacked, const DotArgs& args, int64_t block, int count,
                                        int token) {
  const ActivationQ8* act[T];
  V::F acc[T][R];
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    act[t] = reinterpret_cast<const ActivationQ8*>(args.activations[token + t]) + block;
    TKT_UNROLL for (int r = 0; r < R; ++r) {
      acc[t][r] = block == 0 ? V::zero_f() : V::load(args.out + (token + t) * 32 + r * 16);
    }
  }
  for (int b = 0; b < count; ++b) {
    V::I dot[T][R];
    const int8_t* q[T];
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      q[t] = act[t][b].q;
      TKT_UNROLL for (int r = 0; r < R; ++r) dot[t][r] = V::set_i(0);
    }
    V::I narrow[T][R];
    V::I factors[R];
    TKT_UNROLL for (int r = 0; r < R; ++r) factors[r] = V::set_i(kOnes);
    add_unpacked_groups<Words::kNarrowGroups, T, R, 0, 8, 0>(dot, narrow, unpacked.weights[b], q, factors);
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      const V::F d = V::set_f(act[t][b].d);
      TKT_UNROLL for (int r = 0; r < R; ++r) {
        if constexpr (Words::kOffsetLog2 >= 0) {
          const V::I neg_sum = V::broadcast_i(&act[t][b].neg_sum);
          dot[t][r] = V::add_i(dot[t][r], V::template shift_left<Words::kOffsetLog2>(neg_sum));
        }
        const V::F both_d = V::mul(load_float(unpacked.scales[b][0][r]), d);
        acc[t][r] = V::fma(both_d, V::to_float(dot[t][r]), acc[t][r]);
        if constexpr (Words::kHasMinima) {
          acc[t][r] = V::fma(load_float(unpacked.minima[b][r]), V::set_f(act[t][b].d_sum), acc[t][r]);
        }
      }
    }
  }
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    TKT_UNROLL for (int r = 0; r < R; ++r) V::store(args.out + (token + t) * 32 + r * 16, acc[t][r]);
  }
}

// ---- Tiling over tokens -------------------------------------------------------------------------------------------

// Asks for what is unpacked next, a few lines before each tile: all of them at once would wait for each other. Two
// threads, 64 tokens: Q4_K 1,105 and 1,210 GOPS; Q6_K, whose separate scales nobody asked for, 980 and 1,150.
template <class Words, int R>
struct NextBlocks {
  const uint8_t* words[R];
  int lines_per_tile;
  int line = 0;

  NextBlocks(const DotArgs& args, int64_t block, int count, int tiles)
      : lines_per_tile((count * Words::kWords + tiles - 1) / tiles) {
    for (int r = 0; r < R; ++r) words[r] = block_words<Words>(args.panels[r], args.blocks, block + count);
  }
  void prefetch() {
    for (const int end = line + lines_per_tile; line < end; ++line) {
      for (int r = 0; r < R; ++r) V::prefetch(words[r] + line * 64);
    }
  }
};

// One of the tiles of at most kTokens that share all tokens evenly: 7 = 4 + 3, 13 = 5 + 4 + 4; 9 = 3 + 3 + 3 and 5 = 3
// + 2 where kTokens is 4.
template <class Words, int kTokens, int R, int T>
TKT_INLINE void dot_even_tile(const UnpackedBlock<R>& unpacked, const DotArgs& args, int64_t block, int count,
                              int token, int tokens) {
  static_assert(unpack_tokens<Words>() >= 3 && kTokens >= 4 && kTokens <= 6, "smaller tiles would be needed");
  constexpr int kSmallest = unpack_tokens<Words>() < 6 ? 2 : 3;
  if constexpr (T > kSmallest) {
    if (tokens < T) return dot_even_tile<Words, kTokens, R, T - 1>(unpacked, args, block, count, token, tokens);
  }
  if constexpr (Words::kColumns == 256) {
    dot_tile_unpacked_k<Words, T, R>(unpacked, args, block, token);
  } else {
    dot_tile_unpacked_32<Words, T, R>(unpacked, args, block, count, token);
  }
}

// Q6_K adds two products before they become floats, which takes registers: on Zen 5 it is 6% faster with 4 tokens.
template <class Words>
constexpr int unpacked_tile_tokens() {
  if constexpr (Words::kColumns == 256) {
    if (Words::kSubColumns == 16) return 4;
  }
  return V::kTileTokensK;
}

template <class Words, int R>
static inline void unpacked_pass(const DotArgs& args) {
  constexpr int kTokens = unpacked_tile_tokens<Words>();
  constexpr int kBlocks = 256 / Words::kColumns;
  const int tiles = (args.tokens + kTokens - 1) / kTokens;
  UnpackedBlock<R> unpacked;
  for (int64_t block = 0; block < args.blocks; block += kBlocks) {
    const int count = args.blocks - block < kBlocks ? static_cast<int>(args.blocks - block) : kBlocks;
    if constexpr (kBlocks == 1) {
      unpack_block<Words, R>(args, block, unpacked);
    } else {
      unpack_blocks_32<Words, R>(args, block, count, unpacked);
    }
    NextBlocks<Words, R> next(args, block, count, tiles);
    int token = 0;
    for (int tile = 1; tile <= tiles; ++tile) {
      const int end = args.tokens * tile / tiles;
      next.prefetch();
      dot_even_tile<Words, kTokens, R, kTokens>(unpacked, args, block, count, token, end - token);
      token = end;
    }
  }
}

template <class Words>
static inline void dot_many(const DotArgs& args) {
  const int passes = (args.tokens + kUnpackPassTokens - 1) / kUnpackPassTokens;
  for (int i = 0; i < passes; ++i) {
    const int begin = args.tokens * i / passes;
    DotArgs pass = args;
    pass.activations += begin;
    pass.out += begin * 32;
    pass.tokens = args.tokens * (i + 1) / passes - begin;
    if (args.panel_count == 2 && V::kTilePanels == 2) {
      unpacked_pass<Words, V::kTilePanels>(pass);
    } else {
      for (int p = 0; p < args.panel_count; ++p) unpacked_pass<Words, 1>(one_panel(pass, p));
    }
  }
}
