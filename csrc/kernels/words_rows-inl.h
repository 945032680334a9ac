// Types whose blocks stand whole in a panel, by rows: a block of 16 rows is decoded to signed bytes in L1, then all
// tokens run over it. One loop serves them all, so that a type costs its decoder alone. Types with a grid are looked up
// row by row (formats/grid_rows.h) and get signs and scales from vectors, the others from scalar code
// (formats/unpack_rows.h).

template <int R>
struct UnpackedRows {
  alignas(64) uint8_t weights[64][R][64];  // of 4 columns
  alignas(64) float scales[16][R][16];     // of 16 columns
  alignas(64) float d[R][16];
};

// Weights are unsigned bytes with an offset. None of these types has one larger than 62, of IQ3_XXS, so that an offset
// of 64 keeps pairs of products below 2^15: 2 * 126 * 127 = 32,004.
constexpr int kRowsOffsetLog2 = V::kAddsIn16Bits ? 6 : 7;
// A byte with its offset: without the bits above the offset's, which are its sign, and with that one flipped.
constexpr uint32_t kRowsOffset = 0x01010101u << kRowsOffsetLog2;
constexpr uint32_t kRowsKeptBits = 2 * kRowsOffset - 0x01010101u;

constexpr bool has_grid(WeightType type) {
#define TKT_OR(name) type == WeightType::k##name ||
  return TKT_GRID_TYPES(TKT_OR) false;
#undef TKT_OR
}
constexpr bool has_eighths(WeightType type) { return type == WeightType::kIQ1_S || type == WeightType::kIQ1_M; }

// Of each column of GridRows::signs, a bit.
template <WeightType type>
TKT_INLINE V::I grid_signs(V::I stored) {
  if constexpr (type == WeightType::kIQ1_S) {  // one for all
    return V::template shift_right_signed<31>(V::template shift_left<16>(stored));
  } else if constexpr (type == WeightType::kIQ1_M) {  // one for 8, the highest of each nibble
    V::I bits = V::and_i(V::template shift_right<3>(stored), V::set_i(0x1111));
    bits = V::and_i(V::or_i(bits, V::template shift_left<8>(bits)), V::set_i(0x00110011));
    bits = V::and_i(V::or_i(bits, V::template shift_left<4>(bits)), V::set_i(0x01010101));
    return V::sub_i(V::template shift_left<8>(bits), bits);
  } else if constexpr (type == WeightType::kIQ3_S || type == WeightType::kIQ2_S) {
    return stored;
  } else {
    V::I bits = stored;
    if constexpr (type != WeightType::kIQ2_XS) {
      bits = V::or_i(
          V::or_i(V::and_i(stored, V::set_i(0x7f)), V::and_i(V::template shift_left<1>(stored), V::set_i(0x7f00))),
          V::or_i(V::and_i(V::template shift_left<2>(stored), V::set_i(0x7f0000)),
                  V::and_i(V::template shift_left<3>(stored), V::set_i(0x7f000000))));
    }
    // The eighth of each byte makes their number even. What comes from the byte above does not reach bit 0.
    V::I odd = V::xor_i(bits, V::template shift_right<4>(bits));
    odd = V::xor_i(odd, V::template shift_right<2>(odd));
    odd = V::xor_i(odd, V::template shift_right<1>(odd));
    return V::or_i(bits, V::template shift_left<7>(V::and_i(odd, V::set_i(0x01010101))));
  }
}

template <WeightType type, int first>
TKT_INLINE V::I signed_entries(V::I entries, V::I signs) {
  V::I weights;
  if constexpr (has_eighths(type)) {  // 8 w + 1, or 2 less
    const V::I plus = V::or_i(V::and_i(V::template shift_left<3>(entries), V::set_i(static_cast<int32_t>(0xf8f8f8f8u))),
                              V::set_i(0x01010101));
    weights = V::template sub_bytes_where<first>(signs, plus, V::set_i(0x02020202), plus);
  } else {
    weights = V::template sub_bytes_where<first>(signs, V::set_i(0), entries, entries);
  }
  if constexpr (V::kAddsIn16Bits) weights = V::and_i(weights, V::set_i(static_cast<int32_t>(kRowsKeptBits)));
  return V::xor_i(weights, V::set_i(static_cast<int32_t>(kRowsOffset)));
}

// 2 sc + 1 of sc in the lowest bits.
template <WeightType type>
TKT_INLINE V::F odd_scale(V::I stored) {
  const V::I sc = V::and_i(stored, V::set_i(has_eighths(type) ? 7 : 15));
  return V::to_float(V::or_i(V::template shift_left<1>(sc), V::set_i(1)));
}

template <WeightType type, int R, int k>
TKT_INLINE void unpack_entries(const GridRows& grid, int j, V::I signs, UnpackedRows<R>& rows, int r) {
  const uint64_t* entries = grid.entries[j * 4 + k];
  const V::I a = V::load_i(entries), b = V::load_i(entries + 8);
  V::store_i(rows.weights[j * 8 + 2 * k][r], signed_entries<type, 8 * k>(V::lower_of_pairs(a, b), signs));
  V::store_i(rows.weights[j * 8 + 2 * k + 1][r], signed_entries<type, 8 * k + 4>(V::upper_of_pairs(a, b), signs));
  if constexpr (k < 3) unpack_entries<type, R, k + 1>(grid, j, signs, rows, r);
}

template <WeightType type, int R>
TKT_NOINLINE void unpack_grid(const GridRows& grid, UnpackedRows<R>& rows, int r) {
  V::store(rows.d[r], V::load(grid.d));
  for (int j = 0; j < 8; ++j) {
    const V::I stored = V::load_i(grid.signs[j]);
    V::F scales[2];
    if constexpr (type == WeightType::kIQ3_XXS || type == WeightType::kIQ2_XXS) {
      scales[0] = scales[1] = odd_scale<type>(V::template shift_right<28>(stored));
    } else if constexpr (type == WeightType::kIQ1_S) {
      scales[0] = scales[1] = odd_scale<type>(V::template shift_right<12>(stored));
    } else {
      const V::I both = V::load_i(grid.scales[j]);
      scales[0] = odd_scale<type>(both);
      scales[1] = type == WeightType::kIQ3_S
                      ? scales[0]
                      : odd_scale<type>(V::template shift_right<type == WeightType::kIQ1_M ? 3 : 4>(both));
    }
    for (int half = 0; half < 2; ++half) V::store(rows.scales[j * 2 + half][r], scales[half]);
    unpack_entries<type, R, 0>(grid, j, grid_signs<type>(stored), rows, r);
  }
}

template <int R>
static void unpack_rows_of(WeightType type, const DotArgs& args, int64_t block, UnpackedRows<R>& rows) {
  const int64_t bytes = int64_t{info_of(type).block_bytes} * kPanelRows;
  for (int r = 0; r < R; ++r) {
    if (has_grid(type)) {
      GridRows grid;
      look_up_grid_rows(type, args.panels[r] + block * bytes, grid);
      switch (type) {
#define TKT_CASE(name)                                  \
  case WeightType::k##name:                             \
    unpack_grid<WeightType::k##name, R>(grid, rows, r); \
    break;
        TKT_GRID_TYPES(TKT_CASE)
#undef TKT_CASE
        default:
          break;
      }
      continue;
    }
    const UnpackedRowsTarget to{rows.weights[0][r], R * 64, kRowsKeptBits, kRowsOffset,
                                rows.scales[0][r],  R * 16, rows.d[r]};
    unpack_rows(type, args.panels[r] + block * bytes, to);
  }
}

// sums = scale * dot of 16 columns, + that of the next 16.
template <int T, int R, int half>
TKT_INLINE void add_row_halves(V::F (&sums)[T][R], const UnpackedRows<R>& rows, int b,
                               const ActivationQ8* const (&act)[T]) {
  V::I dot[T][R];
  V::I narrow[T][R];
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    const V::I start = V::template shift_left<kRowsOffsetLog2>(V::broadcast_i(&act[t][b].neg_sum16[half]));
    TKT_UNROLL for (int r = 0; r < R; ++r) dot[t][r] = start;
  }
  TKT_UNROLL for (int group = half * 4; group < half * 4 + 4; ++group) {
    V::I w[R];
    TKT_UNROLL for (int r = 0; r < R; ++r) w[r] = V::load_i(rows.weights[b * 8 + group][r]);
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      const V::I a = V::broadcast_i(act[t][b].q + 4 * group);
      TKT_UNROLL for (int r = 0; r < R; ++r) accumulate<1, 0, 1>(dot[t][r], narrow[t][r], w[r], a);
    }
  }
  TKT_UNROLL for (int r = 0; r < R; ++r) {
    const V::F scale = V::load(rows.scales[b * 2 + half][r]);
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      const V::F of_half = V::to_float(dot[t][r]);
      sums[t][r] = half == 0 ? V::mul(of_half, scale) : V::fma(of_half, scale, sums[t][r]);
    }
  }
  if constexpr (half == 0) add_row_halves<T, R, 1>(sums, rows, b, act);
}

template <int T, int R>
TKT_NOINLINE void dot_rows_tile(const UnpackedRows<R>& rows, const DotArgs& args, int64_t block, int blocks32,
                                int token) {
  const ActivationQ8* act[T];
  V::F acc[T][R];
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    act[t] = reinterpret_cast<const ActivationQ8*>(args.activations[token + t]) + block * blocks32;
    TKT_UNROLL for (int r = 0; r < R; ++r) acc[t][r] = V::zero_f();
  }
  for (int b = 0; b < blocks32; ++b) {
    V::F sums[T][R];
    add_row_halves<T, R, 0>(sums, rows, b, act);
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      const V::F d = V::set_f(act[t][b].d);
      TKT_UNROLL for (int r = 0; r < R; ++r) acc[t][r] = V::fma(sums[t][r], d, acc[t][r]);
    }
  }
  TKT_UNROLL for (int r = 0; r < R; ++r) {
    const V::F d = V::load(rows.d[r]);
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      const V::F before = block == 0 ? V::zero_f() : V::load(args.out + (token + t) * 32 + r * 16);
      acc[t][r] = V::fma(d, acc[t][r], before);
    }
  }
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    TKT_UNROLL for (int r = 0; r < R; ++r) V::store(args.out + (token + t) * 32 + r * 16, acc[t][r]);
  }
}

constexpr int kRowsTileTokens = 4;

template <int R>
static void dot_rows_of(WeightType type, const DotArgs& args) {
  const int blocks32 = info_of(type).block_elements / 32;
  UnpackedRows<R> rows;
  for (int64_t block = 0; block < args.blocks; ++block) {
    unpack_rows_of<R>(type, args, block, rows);
    int token = 0;
    for (; token + kRowsTileTokens <= args.tokens; token += kRowsTileTokens) {
      dot_rows_tile<kRowsTileTokens, R>(rows, args, block, blocks32, token);
    }
    for (; token < args.tokens; ++token) dot_rows_tile<1, R>(rows, args, block, blocks32, token);
  }
}

TKT_NOINLINE void dot_rows(WeightType type, const DotArgs& args) {
  if (args.panel_count == 2 && V::kTilePanels == 2) return dot_rows_of<V::kTilePanels>(type, args);
  for (int p = 0; p < args.panel_count; ++p) dot_rows_of<1>(type, one_panel(args, p));
}

TKT_NOINLINE void gemv_rows(WeightType type, const GemvArgs& args) {
  for (int64_t p = 0; p < args.panel_count; ++p) {
    const uint8_t* panel = args.panels + p * args.panel_bytes;
    dot_rows_of<1>(type, {{panel, nullptr}, 1, args.blocks, &args.activations, 1, args.out + p * 16, args.prefetch});
  }
}

#define TKT_ROW_WORDS(name)                    \
  struct name##Words;                          \
  template <>                                  \
  void dot<name##Words>(const DotArgs& args) { \
    dot_rows(WeightType::k##name, args);       \
  }                                            \
  template <>                                  \
  void gemv<name##Words>(const GemvArgs& args) { \
    gemv_rows(WeightType::k##name, args);      \
  }
TKT_ROW_TYPES(TKT_ROW_WORDS)

#define TKT_TYPES_OF_FILE(X) TKT_ROW_TYPES(X)
