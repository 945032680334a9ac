// Types whose blocks stand whole in a panel, by rows: a block of 16 rows is decoded to bytes in L1, then all tokens run
// over it. One loop serves them all, so that a type costs its decoder alone. Types with a grid are looked up row by row
// (formats/grid_rows.h) and get signs and scales from vectors, the others from scalar code (formats/unpack_rows.h). One
// token of a type with a grid goes without L1, at the end of this file.

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
constexpr bool has_one_integer_scale_in_32(WeightType type) {
  return type == WeightType::kIQ3_S || type == WeightType::kIQ3_XXS || type == WeightType::kIQ2_XXS ||
         type == WeightType::kIQ1_S;
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

// Of IQ1, 8 w + 1, which is 2 less where the sign is minus.
TKT_INLINE V::I eighths(V::I entries) {
  return V::or_i(V::and_i(V::template shift_left<3>(entries), V::set_i(static_cast<int32_t>(0xf8f8f8f8u))),
                 V::set_i(0x01010101));
}
TKT_INLINE V::I with_offset(V::I weights) {
  if constexpr (V::kAddsIn16Bits) weights = V::and_i(weights, V::set_i(static_cast<int32_t>(kRowsKeptBits)));
  return V::xor_i(weights, V::set_i(static_cast<int32_t>(kRowsOffset)));
}

template <WeightType type, int first>
TKT_INLINE V::I signed_entries(V::I entries, V::I signs) {
  if constexpr (has_eighths(type)) {
    const V::I plus = eighths(entries);
    return with_offset(V::template sub_bytes_where<first>(signs, plus, V::set_i(0x02020202), plus));
  } else {
    return with_offset(V::template sub_bytes_where<first>(signs, V::set_i(0), entries, entries));
  }
}

// 2 sc + 1 of sc in the lowest bits.
template <WeightType type>
TKT_INLINE V::F odd_scale(V::I stored) {
  const V::I sc = V::and_i(stored, V::set_i(has_eighths(type) ? 7 : 15));
  return V::to_float(V::or_i(V::template shift_left<1>(sc), V::set_i(1)));
}

// Of the 16 columns first and last in 32.
template <WeightType type>
TKT_INLINE void grid_scales(const GridScales& grid, int j, V::F (&scales)[2]) {
  if constexpr (type == WeightType::kIQ3_XXS || type == WeightType::kIQ2_XXS) {
    scales[0] = scales[1] = odd_scale<type>(V::template shift_right<28>(V::load_i(grid.signs[j])));
  } else if constexpr (type == WeightType::kIQ1_S) {
    scales[0] = scales[1] = odd_scale<type>(V::template shift_right<12>(V::load_i(grid.signs[j])));
  } else {
    const V::I both = V::load_i(grid.scales[j]);
    scales[0] = odd_scale<type>(both);
    scales[1] = type == WeightType::kIQ3_S
                    ? scales[0]
                    : odd_scale<type>(V::template shift_right<type == WeightType::kIQ1_M ? 3 : 4>(both));
  }
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
    V::F scales[2];
    grid_scales<type>(grid, j, scales);
    for (int half = 0; half < 2; ++half) V::store(rows.scales[j * 2 + half][r], scales[half]);
    unpack_entries<type, R, 0>(grid, j, grid_signs<type>(V::load_i(grid.signs[j])), rows, r);
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

// sums = scale * dot of kColumns columns, + that of the next 16 where kColumns is 16: the same number where both have
// one scale, which is an integer.
template <int kColumns, int T, int R, int half>
TKT_INLINE void add_row_halves(V::F (&sums)[T][R], const UnpackedRows<R>& rows, int b,
                               const ActivationQ8* const (&act)[T]) {
  constexpr int kGroups = kColumns / 4;
  V::I dot[T][R];
  V::I narrow[T][R];
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    const int32_t* neg_sum = kColumns == 32 ? &act[t][b].neg_sum : &act[t][b].neg_sum16[half];
    const V::I start = V::template shift_left<kRowsOffsetLog2>(V::broadcast_i(neg_sum));
    TKT_UNROLL for (int r = 0; r < R; ++r) dot[t][r] = start;
  }
  TKT_UNROLL for (int group = half * kGroups; group < (half + 1) * kGroups; ++group) {
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
  if constexpr ((half + 1) * kColumns < 32) add_row_halves<kColumns, T, R, half + 1>(sums, rows, b, act);
}

template <int kColumns, int T, int R>
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
    add_row_halves<kColumns, T, R, 0>(sums, rows, b, act);
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

template <int kColumns, int R>
static void dot_rows_tiles(const UnpackedRows<R>& rows, const DotArgs& args, int64_t block, int blocks32) {
  int token = 0;
  for (; token + kRowsTileTokens <= args.tokens; token += kRowsTileTokens) {
    dot_rows_tile<kColumns, kRowsTileTokens, R>(rows, args, block, blocks32, token);
  }
  for (; token < args.tokens; ++token) dot_rows_tile<kColumns, 1, R>(rows, args, block, blocks32, token);
}

template <int R>
static void dot_rows_of(WeightType type, const DotArgs& args) {
  const int blocks32 = info_of(type).block_elements / 32;
  UnpackedRows<R> rows;
  for (int64_t block = 0; block < args.blocks; ++block) {
    unpack_rows_of<R>(type, args, block, rows);
    if (has_one_integer_scale_in_32(type)) {
      dot_rows_tiles<32, R>(rows, args, block, blocks32);
    } else {
      dot_rows_tiles<16, R>(rows, args, block, blocks32);
    }
  }
}

TKT_NOINLINE void gemv_rows(WeightType type, const GemvArgs& args);

TKT_NOINLINE void dot_rows(WeightType type, const DotArgs& args) {
  if (has_grid(type) && args.tokens == 1) {
    for (int p = 0; p < args.panel_count; ++p) {
      gemv_rows(type, {args.panels[p], 1, 0, args.blocks, args.activations[0], args.out + p * 16, args.prefetch});
    }
    return;
  }
  if (args.panel_count == 2 && V::kTilePanels == 2) return dot_rows_of<V::kTilePanels>(type, args);
  for (int p = 0; p < args.panel_count; ++p) dot_rows_of<1>(type, one_panel(args, p));
}

// ---- One token ------------------------------------------------------------------------------------------------------

// Bytes in L1 that only one token multiplies cost more than the products: places are looked up into registers, 64
// columns of a row at a time, and what is lane = column becomes lane = row as sums of 16 columns, which are exact.

template <class Block>
TKT_INLINE V::I entries_of_64(const Block& block, const void* grid, int j) {
  return V::set_eight(grid_entry(block, grid, j, 0), grid_entry(block, grid, j, 1),          //
                      grid_entry(block, grid, j, 2), grid_entry(block, grid, j, 3),          //
                      grid_entry(block, grid, j + 1, 0), grid_entry(block, grid, j + 1, 1),  //
                      grid_entry(block, grid, j + 1, 2), grid_entry(block, grid, j + 1, 3));
}

// Dot products of 16 columns of a row, in the order of sums_of_fours. Unsigned weights: the sign goes to the
// activation, or, in IQ1, the weights have an offset.
template <WeightType type, class Block>
TKT_INLINE V::I dots_of_row(const Block& block, const void* grid, const uint32_t (&signs)[8][kPanelRows], int row,
                            const V::I (&act)[4]) {
  V::I dots[4];
  TKT_UNROLL for (int c = 0; c < 4; ++c) {
    const uint64_t minus = signs[2 * c][row] | uint64_t{signs[2 * c + 1][row]} << 32;
    V::I w = entries_of_64(block, grid, 2 * c);
    V::I a = act[c];
    if constexpr (has_eighths(type)) {
      w = eighths(w);
      w = with_offset(V::sub_bytes_of(minus, w, V::set_i(0x02020202), w));
    } else {
      a = V::sub_bytes_of(minus, V::set_i(0), a, a);
    }
    V::I narrow;
    dots[c] = V::set_i(0);
    accumulate<1, 0, 1>(dots[c], narrow, w, a);
  }
  return V::sums_of_fours(dots[0], dots[1], dots[2], dots[3]);
}

template <WeightType type, class Block>
TKT_INLINE V::F add_grid_block(const Block* blocks, const void* grid, const ActivationQ8* act, V::F before) {
  GridScales stored;
  look_up_grid_scales(type, reinterpret_cast<const uint8_t*>(blocks), stored);
  alignas(64) uint32_t signs[8][kPanelRows];
  for (int j = 0; j < 8; ++j) V::store_i(signs[j], grid_signs<type>(V::load_i(stored.signs[j])));
  V::I q[4];
  TKT_UNROLL for (int c = 0; c < 4; ++c) q[c] = V::load_two(act[2 * c].q, act[2 * c + 1].q);
  V::I dots[kPanelRows];
  for (int row = 0; row < kPanelRows; ++row) dots[row] = dots_of_row<type>(blocks[row], grid, signs, row, q);
  V::transpose(dots);

  V::F acc = V::zero_f();
  for (int j = 0; j < 8; ++j) {
    V::F scales[2], parts[2];
    grid_scales<type>(stored, j, scales);
    for (int half = 0; half < 2; ++half) {
      V::I dot = dots[4 * (j % 2 * 2 + half) + j / 2];
      if constexpr (has_eighths(type)) {
        dot = V::add_i(dot, V::template shift_left<kRowsOffsetLog2>(V::broadcast_i(&act[j].neg_sum16[half])));
      }
      parts[half] = V::to_float(dot);
    }
    const V::F sum = V::fma(parts[1], scales[1], V::mul(parts[0], scales[0]));
    acc = V::fma(sum, V::set_f(act[j].d), acc);
  }
  return V::fma(V::load(stored.d), acc, before);
}

template <WeightType type, class Block>
TKT_NOINLINE void gemv_grid(const GemvArgs& args) {
  const void* grid = grid_of(type);
  const ActivationQ8* act = reinterpret_cast<const ActivationQ8*>(args.activations);
  for (int64_t p = 0; p < args.panel_count; ++p) {
    const Block* blocks = reinterpret_cast<const Block*>(args.panels + p * args.panel_bytes);
    V::F acc = V::zero_f();
    for (int64_t block = 0; block < args.blocks; ++block) {
      acc = add_grid_block<type>(blocks + block * kPanelRows, grid, act + block * 8, acc);
    }
    V::store(args.out + p * 16, acc);
  }
}

TKT_NOINLINE void gemv_rows(WeightType type, const GemvArgs& args) {
  switch (type) {
#define TKT_CASE(name)      \
  case WeightType::k##name: \
    return gemv_grid<WeightType::k##name, Block##name>(args);
    TKT_GRID_TYPES(TKT_CASE)
#undef TKT_CASE
    default:
      break;
  }
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
