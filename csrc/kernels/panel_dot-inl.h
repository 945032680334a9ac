// Dot products of packed panels with activation rows: the loop nests, written once over an ISA's primitives.
//
// An ISA file defines `struct V` in its namespace (see the list in csrc/README.md) and includes this file inside that
// namespace. Never include it anywhere else. No function of the standard library may be instantiated here: its weak
// symbol would carry this file's instructions to CPUs that lack them.
//
// A tile is T tokens x R panels of 16 rows; lane = row, so no lane is ever reduced and every output sees the same
// operations in the same order whatever T and R are.

// Where block `block` of a panel begins, and its f16 scales where they are not in it: block_formats.h has the layout.
template <class Words>
TKT_INLINE const uint8_t* block_words(const uint8_t* panel, int64_t blocks, int64_t block) {
  constexpr int64_t kWordBytes = Words::kWords * 64;
  if constexpr (Words::kScaleBytes == 0) return panel + block * kWordBytes;
  constexpr int64_t kBytes = Words::kScaleBytes;
  constexpr int64_t kTogether = kBytes == 0 ? 1 : 64 / kBytes;
  const int64_t first = block / kTogether * kTogether;
  const int64_t scales = first + kTogether <= blocks ? 64 : (blocks - first) * kBytes;
  return panel + first * (kWordBytes + kBytes) + scales + (block - first) * kWordBytes;
}
template <class Words>
TKT_INLINE const uint8_t* block_scales(const uint8_t* panel, int64_t block) {
  constexpr int64_t kBytes = Words::kScaleBytes;
  if constexpr (kBytes == 0) return panel + block * Words::kWords * 64;
  constexpr int64_t kTogether = kBytes == 0 ? 1 : 64 / kBytes;
  return panel + block / kTogether * kTogether * (Words::kWords * 64 + kBytes) + block % kTogether * kBytes;
}

// In bursts: lines first to end - 1 of those that lie kBurstBytes behind `words`. 8 and 16 KB are alike.
constexpr int64_t kBurstBytes = 8192;
TKT_INLINE void prefetch_burst(const uint8_t* words, int first, int end, Prefetch prefetch) {
  if (prefetch != Prefetch::kBursts) return;
  TKT_UNROLL for (int line = first; line < end; ++line) V::prefetch_to_l2(words + line * 64 + kBurstBytes);
}

// Per line: one prefetch with each line, among the instructions that compute it, so that a core that looks 256
// instructions ahead, 10 lines, has more misses under way. Two cores of Zen 3, one token, GB/s against without: Q4_K
// 1.14, Q5_K 1.17, Q6_K 1.16, Q8_0 1.12, Q5_0 and Q4_0 1.19; 1 and 2 KB are about as good. Several lines in one place,
// which is also what gcc makes of prefetches that it may move, are slower than none there: they wait for the few
// buffers that misses have. Tiles of more than Words::kPerLineTokens tokens do not prefetch: Q4_K loses 4% with 4
// tokens. Floats, with few instructions to a line, lose 2 to 6% with one.
constexpr int64_t kPerLineBytes = 1536;
TKT_INLINE void prefetch_line(const uint8_t* line, Prefetch prefetch) {
  if (prefetch == Prefetch::kPerLine) V::prefetch_here(line + kPerLineBytes);
}

// Left to the hardware: on AVX-512 one token reads a little of the line that comes next. Why that helps is not known,
// only that it does, where asking in bursts hurts. Share of the read bandwidth of one core of Zen 4 with bursts,
// without both, with this: Q4_K 0.73, 0.85, 0.98, Q5_K 0.55, 0.78, 0.98, Q6_K 0.7, 0.95, 0.95; two lines ahead is as
// good, four are not. Behind the last line of all lies kReadPast (memory.h).
TKT_INLINE void touch(const uint8_t* p, Prefetch prefetch) {
  if (V::kTouchesNextLine && prefetch == Prefetch::kHardware) (void)*reinterpret_cast<const volatile uint32_t*>(p);
}

// The activations of the 256 columns after these, all lines at once: rows that do not stay in L1 while panels stream
// through it come from L2, and there they wait behind the weights that memory has yet to give. One token, one core of
// Zen 4, 7,168 columns, share of the read bandwidth: Q4_K 0.79 and 0.95, Q5_K 0.71 and 0.95, Q6_K 0.80 and 0.98; two
// tokens, two cores, Q6_K 0.66 and 0.84. They must be prefetched some 30 lines of weights ahead, no more and no less:
// after 70 they are gone again. Three and four tokens of 2,048 columns lose up to 7%, of 7,168 they gain 5 to 16.
// Floats, whose rows are four times as long, gain nothing.
constexpr int64_t kLongRow = 4096;
template <int T>
TKT_INLINE void prefetch_next_activations(const ActivationQ8* these, int64_t cols) {
  if (T > 2 && cols < kLongRow) return;
  constexpr int kLines = (8 * sizeof(ActivationQ8) + 63) / 64;
  const uint8_t* next = reinterpret_cast<const uint8_t*>(these + 8);
  TKT_UNROLL for (int line = 0; line < kLines; ++line) V::prefetch_here(next + line * 64);
}

// Factors that leave 16-bit sums as they are.
constexpr int32_t kOnes = 0x00010001;

// dot += the products of one group of 4 columns. Without VNNI, byte products are first added in 16 bits, for as many
// groups as cannot overflow: kNarrowGroups * 2 * (largest weight) * 127 <= 32,767. 0 where not even one group can: such
// weights come as signed bytes. Widening them multiplies by `factors`, a pair of 16 bits to a lane.
template <int kNarrowGroups, int group, int kGroups, class Isa = V>
TKT_INLINE void accumulate(typename Isa::I& dot, typename Isa::I& narrow, typename Isa::I w, typename Isa::I a,
                           typename Isa::I factors = V::set_i(kOnes)) {
  if constexpr (!Isa::kAddsIn16Bits) {
    dot = Isa::dot4(dot, w, a);
  } else if constexpr (kNarrowGroups == 0) {
    dot = Isa::dot4_signed(dot, w, a, factors);
  } else {
    const typename Isa::I pairs = Isa::pair_products(w, a);
    narrow = group % kNarrowGroups == 0 ? pairs : Isa::add_pairs(narrow, pairs);
    constexpr bool kFull = group % kNarrowGroups == kNarrowGroups - 1;
    if constexpr (kFull || group == kGroups - 1) dot = Isa::add_i(dot, Isa::widen_pairs(narrow, factors));
  }
}

// `mask` of each byte, after `kShift` bits to the right; what comes along from the byte above is to be masked.
template <int kShift>
TKT_INLINE V::I bits_of(V::I bytes, uint32_t mask) {
  return V::and_i(V::template shift_right<kShift>(bytes), V::set_i(static_cast<int32_t>(mask * 0x01010101u)));
}
TKT_INLINE V::I word_at(const uint8_t* set, int word) { return V::load_i(set + word * 64); }

// Vector `2 * group + nibble` of a set (block_formats.h).
template <int vector>
TKT_INLINE V::I four_bits(const uint8_t* set) {
  return bits_of<4 * vector>(word_at(set, 0), 0x0f);
}
template <int vector>
TKT_INLINE V::I two_bits(const uint8_t* set) {
  return bits_of<2 * vector>(word_at(set, 0), 0x03);
}
template <int vector>
TKT_INLINE V::I three_bits(const uint8_t* set) {
  if constexpr (vector < 6) return bits_of<3 * (vector % 2)>(word_at(set, vector / 2), 0x07);
  return V::or_i(bits_of<6>(word_at(set, vector - 6), 0x03), bits_of<vector - 2>(word_at(set, 2), 0x04));
}
template <int vector>
TKT_INLINE V::I six_bits(const uint8_t* set) {
  if constexpr (vector < 3) return bits_of<0>(word_at(set, vector), 0x3f);
  return V::or_i(V::or_i(bits_of<6>(word_at(set, 0), 0x03), bits_of<4>(word_at(set, 1), 0x0c)),
                 bits_of<2>(word_at(set, 2), 0x30));
}
template <int vector>
TKT_INLINE V::I five_bits(const uint8_t* set) {
  constexpr int kWord[8] = {0, 1, 0, 2, 3, 2, 4, 4};  // the one with the lowest bits
  const V::I word = word_at(set, kWord[vector]);
  if constexpr (vector != 2 && vector != 5 && vector != 7) return bits_of<0>(word, 0x1f);
  const V::I low = bits_of<5>(word, 0x07);
  if constexpr (vector < 7) return V::or_i(low, bits_of<3>(word_at(set, kWord[vector] + 1), 0x18));
  return V::or_i(V::or_i(low, bits_of<2>(word_at(set, 1), 0x08)), bits_of<1>(word_at(set, 3), 0x10));
}

// ---- 32-wide types: weight bytes are unsigned (q + offset), the offset is taken back through the block's sum. -------

// Groups of 4 columns are taken in an order in which words are first needed one after the other: group_at(position).

template <class Words, int T, int R, int position>
TKT_INLINE void add_groups_32(V::I (&dot)[T][R], V::I (&narrow)[T][R], const uint8_t* const (&words)[R],
                              const int8_t* const (&q)[T], Prefetch prefetch) {
  V::I w[R];
  // Tiles after the first take the panels from L2. Two cores of Zen 4, 16 and 60 tokens: Q5_0 528 and 593 GOPS without
  // this, 589 and 648 with; Q8_0, which has more lines to a product, 5% less.
  if constexpr (T > 1 && Words::kWords < 8 && position < Words::kWords) {
  TKT_UNROLL for (int r = 0; r < R; ++r) V::prefetch(words[r] + position * 64 + 1024);
  }
  TKT_UNROLL for (int r = 0; r < R; ++r) w[r] = Words::template weights<position>(words[r]);
  if constexpr (T <= Words::kPerLineTokens && position < Words::kWords) {
    TKT_UNROLL for (int r = 0; r < R; ++r) prefetch_line(words[r] + position * 64, prefetch);
  }
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    const V::I a = V::broadcast_i(q[t] + 4 * Words::group_at(position));
    TKT_UNROLL for (int r = 0; r < R; ++r) {
      accumulate<Words::kNarrowGroups, position, 8>(dot[t][r], narrow[t][r], w[r], a);
    }
  }
  if constexpr (position < 7) add_groups_32<Words, T, R, position + 1>(dot, narrow, words, q, prefetch);
}

template <class Words, int T, int R>
TKT_INLINE void dot_tile_32(const DotArgs& args, int token, Prefetch prefetch) {
  V::F acc[T][R];
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    TKT_UNROLL for (int r = 0; r < R; ++r) acc[t][r] = V::zero_f();
  }
  const ActivationQ8* act[T];
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    act[t] = reinterpret_cast<const ActivationQ8*>(args.activations[token + t]);
  }
  for (int64_t b = 0; b < args.blocks; ++b) {
    if (b % 8 == 0) {
      TKT_UNROLL for (int t = 0; t < T; ++t) prefetch_next_activations<T>(act[t] + b, args.blocks * 32);
    }
    V::I dot[T][R];
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      V::I start = V::set_i(0);
      if constexpr (Words::kOffsetLog2 >= 0) {
        start = V::template shift_left<Words::kOffsetLog2>(V::broadcast_i(&act[t][b].neg_sum));
      }
      TKT_UNROLL for (int r = 0; r < R; ++r) dot[t][r] = start;
    }
    const uint8_t* words[R];
    TKT_UNROLL for (int r = 0; r < R; ++r) {
      words[r] = block_words<Words>(args.panels[r], args.blocks, b);
      prefetch_burst(block_scales<Words>(args.panels[r], b), 0, 1, prefetch);
      prefetch_burst(words[r], 0, Words::kWords, prefetch);
    }
    const int8_t* q[T];
    TKT_UNROLL for (int t = 0; t < T; ++t) q[t] = act[t][b].q;
    V::I narrow[T][R];
    add_groups_32<Words, T, R, 0>(dot, narrow, words, q, prefetch);
    TKT_UNROLL for (int r = 0; r < R; ++r) {
      const uint8_t* scales = block_scales<Words>(args.panels[r], b);
      const V::F d = Words::load_scales(scales);
      TKT_UNROLL for (int t = 0; t < T; ++t) {
        acc[t][r] = V::fma(V::mul(d, V::set_f(act[t][b].d)), V::to_float(dot[t][r]), acc[t][r]);
      }
      if constexpr (Words::kHasMinima) {
        const V::F min = Words::load_minima(scales);
        TKT_UNROLL for (int t = 0; t < T; ++t) acc[t][r] = V::fma(min, V::set_f(act[t][b].d_sum), acc[t][r]);
      }
    }
  }
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    TKT_UNROLL for (int r = 0; r < R; ++r) V::store(args.out + (token + t) * 32 + r * 16, acc[t][r]);
  }
}

// ---- K-quants ------------------------------------------------------------------------------------------------------

// A chunk is two blocks of 32 columns, of which a set (block_formats.h) holds the same kSetGroups groups of 4 columns.

// The set of a chunk that has group `group` of 4 columns; sets follow the scales.
template <class Words>
TKT_INLINE const uint8_t* set_of(const uint8_t* words, int chunk, int group) {
  return words + (Words::kHeadWords + (chunk * 8 + group) / Words::kSetGroups * Words::kSetWords) * 64;
}

// The words of a set that its groups before `group` have no need of.
template <class Words>
constexpr int first_new_word(int group) {
  return (group * Words::kSetWords + Words::kSetGroups - 1) / Words::kSetGroups;
}

// Per line: for each word that group `group` of a set is the first to need.
template <class Words, int group>
TKT_INLINE void prefetch_with_group(const uint8_t* set, Prefetch prefetch) {
  constexpr int kFirst = first_new_word<Words>(group);
  constexpr int kEnd = first_new_word<Words>(group + 1);
  TKT_UNROLL for (int word = kFirst; word < kEnd; ++word) prefetch_line(set + word * 64, prefetch);
}

// What takes back the offset of sub-block `part` of an activation block.
template <class Words>
TKT_INLINE const int32_t* neg_sum_of(const ActivationQ8& act, int part) {
  return Words::kSubColumns == 32 ? &act.neg_sum : &act.neg_sum16[part];
}

// The low halves of two integers, side by side.
TKT_INLINE V::I pair_of(V::I low, V::I high) {
  return V::or_i(V::and_i(low, V::set_i(0xffff)), V::template shift_left<16>(high));
}

// Groups of 4 columns of one of the two blocks of a chunk, from `group` to the end of a sub-block. The words of high
// nibbles are already prefetched.
template <class Words, int T, int R, int chunk, int nibble, int block, int group>
TKT_INLINE void add_groups_k(V::I (&dot)[T][R], V::I (&narrow)[T][R], const uint8_t* const (&words)[R],
                             const ActivationQ8* const (&act)[T], Prefetch prefetch) {
  constexpr int kGroups = Words::kSubColumns / 4;
  constexpr int kOfSet = group % Words::kSetGroups;
  V::I w[R];
  TKT_UNROLL for (int r = 0; r < R; ++r) {
    const uint8_t* set = set_of<Words>(words[r], chunk, group);
    w[r] = Words::template weights<2 * kOfSet + nibble>(set);
    if constexpr (T <= Words::kPerLineTokens && nibble == 0) prefetch_with_group<Words, kOfSet>(set, prefetch);
  }
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    const V::I a = V::broadcast_i(act[t][block].q + 4 * group);
    TKT_UNROLL for (int r = 0; r < R; ++r) {
      accumulate<Words::kNarrowGroups, group % kGroups, kGroups>(dot[t][r], narrow[t][r], w[r], a);
    }
  }
  if constexpr ((group + 1) % kGroups != 0) {
    add_groups_k<Words, T, R, chunk, nibble, block, group + 1>(dot, narrow, words, act, prefetch);
  }
}

// sums += scale * dot of the sub-blocks of an activation block, from `part` of two, or of one. Bounds: a sub-block of
// 32 gives at most 32 * 31 * 127 * 63 < 2^23, in IQ4_XS 32 * 127 * 127 * 32 < 2^24; two of 16 in Q6_K give
// 2 * 16 * 32 * 127 * 128 < 2^24. Floats hold such sums exactly, and multiply in one operation where integers take
// Intel two: 64 tokens, one core of Emerald Rapids, Q4_K 336 and 371 GOPS, Q6_K 274 and 328.
template <class Words, int T, int R, int block, int part>
TKT_INLINE void add_sub_blocks(V::F (&sums)[T][R], const typename Words::Scales (&scales)[R], int half,
                               const uint8_t* const (&words)[R], const ActivationQ8* const (&act)[T],
                               Prefetch prefetch) {
  constexpr int kChunk = Words::kRun == 1 ? block / 2 : block % 2;
  constexpr int kNibble = Words::kRun == 1 ? block % 2 : block / 2;
  V::I dot[T][R];
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    V::I start = V::set_i(0);
    if constexpr (Words::kOffsetLog2 >= 0) {
      start = V::template shift_left<Words::kOffsetLog2>(V::broadcast_i(neg_sum_of<Words>(act[t][block], part)));
    }
    TKT_UNROLL for (int r = 0; r < R; ++r) dot[t][r] = start;
  }
  V::I narrow[T][R];
  add_groups_k<Words, T, R, kChunk, kNibble, block, part * Words::kSubColumns / 4>(dot, narrow, words, act, prefetch);
  TKT_UNROLL for (int r = 0; r < R; ++r) {
    const V::F scale = V::to_float(scales[r].template scale<block * 32 / Words::kSubColumns + part>(half));
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      const V::F of_part = V::to_float(dot[t][r]);
      sums[t][r] = part == 0 ? V::mul(of_part, scale) : V::fma(of_part, scale, sums[t][r]);
    }
  }
  if constexpr ((part + 1) * Words::kSubColumns < 32) {
    add_sub_blocks<Words, T, R, block, part + 1>(sums, scales, half, words, act, prefetch);
  }
}

// Blocks of 32 columns of half a super-block, from `block` of four on; words and activations are those of the half.
template <class Words, int T, int R, int block>
TKT_INLINE void add_blocks(V::F (&scaled)[T][R], const typename Words::Scales (&scales)[R], int half,
                           const uint8_t* const (&words)[R], const uint8_t* const (&lines)[R],
                           const ActivationQ8* const (&act)[T], Prefetch prefetch) {
  TKT_UNROLL for (int r = 0; r < R; ++r) {
    prefetch_burst(lines[r], (block * Words::kWords + 7) / 8, ((block + 1) * Words::kWords + 7) / 8, prefetch);
  }
  V::F sums[T][R];
  add_sub_blocks<Words, T, R, block, 0>(sums, scales, half, words, act, prefetch);
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    const V::F d = V::set_f(act[t][block].d);
    TKT_UNROLL for (int r = 0; r < R; ++r) scaled[t][r] = V::fma(sums[t][r], d, scaled[t][r]);
  }
  if constexpr (block < 3) add_blocks<Words, T, R, block + 1>(scaled, scales, half, words, lines, act, prefetch);
}

// minima + what the minima of an activation block's weights take away: one of all 32, or a pair of 16 bits, each of 16.
// Those are added as integers, exactly: at most 2 * 15 * 16 * 127.
TKT_INLINE V::F with_minimum(V::F min, const ActivationQ8& a, V::F minima) {
  return V::fma(min, V::set_f(a.d_sum), minima);
}
TKT_INLINE V::F with_minimum(V::I mins, const ActivationQ8& a, V::F minima) {
  return V::fnma(V::to_float(V::widen_pairs(mins, V::broadcast_pair(a.neg_sum16))), V::set_f(a.d), minima);
}

template <class Scales, int T, int j>
TKT_INLINE void add_minima(V::F (&minima)[T], const Scales& scales, int half, const ActivationQ8* const (&act)[T]) {
  const auto min = scales.template min<j>(half);
  TKT_UNROLL for (int t = 0; t < T; ++t) minima[t] = with_minimum(min, act[t][j], minima[t]);
  if constexpr (j < 3) add_minima<Scales, T, j + 1>(minima, scales, half, act);
}

// Loops over halves of a super-block: all of it unrolled would be 45 KB of code for Q6_K and 4 tokens, and most of what
// a compiler has to do; loops over chunks would need the scales in memory, at 3 to 7% of the time of 2 to 6 tokens on
// AVX-512.
template <class Words, int T, int R>
TKT_INLINE void dot_tile_k(const DotArgs& args, int token, Prefetch prefetch) {
  using Scales = typename Words::Scales;
  constexpr int kChunkBytes = 8 / Words::kSetGroups * Words::kSetWords * 64;
  V::F acc[T][R];
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    TKT_UNROLL for (int r = 0; r < R; ++r) acc[t][r] = V::zero_f();
  }
  for (int64_t b = 0; b < args.blocks; ++b) {
    const uint8_t* words[R];
    Scales scales[R];
    TKT_UNROLL for (int r = 0; r < R; ++r) {
      words[r] = block_words<Words>(args.panels[r], args.blocks, b);
      scales[r].read(words[r], block_scales<Words>(args.panels[r], b));
    }
    const ActivationQ8* act[T];
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      act[t] = reinterpret_cast<const ActivationQ8*>(args.activations[token + t]) + b * 8;
      prefetch_next_activations<T>(act[t], args.blocks * 256);
    }
    V::F scaled[T][R];
    TKT_UNROLL for (int t = 0; t < T; ++t) {
      TKT_UNROLL for (int r = 0; r < R; ++r) scaled[t][r] = V::zero_f();
    }
    _Pragma("GCC unroll 1") for (int half = 0; half < 2; ++half) {
      const uint8_t* words_of_half[R];
      const uint8_t* lines_of_half[R];  // likewise, but of all words, scales among them
      TKT_UNROLL for (int r = 0; r < R; ++r) {
        words_of_half[r] = words[r] + half * 2 * kChunkBytes;
        lines_of_half[r] = words[r] + half * Words::kWords / 2 * 64;
      }
      const ActivationQ8* act_of_half[T];
      TKT_UNROLL for (int t = 0; t < T; ++t) act_of_half[t] = act[t] + 4 * half;
      add_blocks<Words, T, R, 0>(scaled, scales, half, words_of_half, lines_of_half, act_of_half, prefetch);
    }
    TKT_UNROLL for (int r = 0; r < R; ++r) {
      TKT_UNROLL for (int t = 0; t < T; ++t) acc[t][r] = V::fma(scales[r].d, scaled[t][r], acc[t][r]);
      // A pass of its own: beside the products, the sums of minima would cost registers that the products need.
      if constexpr (Scales::kHasMinima) {
        V::F minima[T];
        TKT_UNROLL for (int t = 0; t < T; ++t) minima[t] = V::zero_f();
        _Pragma("GCC unroll 1") for (int half = 0; half < 2; ++half) {
          const ActivationQ8* act_of_half[T];
          TKT_UNROLL for (int t = 0; t < T; ++t) act_of_half[t] = act[t] + 4 * half;
          add_minima<Scales, T, 0>(minima, scales[r], half, act_of_half);
        }
        TKT_UNROLL for (int t = 0; t < T; ++t) acc[t][r] = V::fnma(scales[r].dmin, minima[t], acc[t][r]);
      }
    }
  }
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    TKT_UNROLL for (int r = 0; r < R; ++r) V::store(args.out + (token + t) * 32 + r * 16, acc[t][r]);
  }
}

// ---- K-quants times one token: one panel, whose words are each loaded once, in ascending order. ---------------------

// Groups of a chunk, from `group` to the end of a sub-block; dot[nibble].
template <class Words, int chunk, int group>
TKT_INLINE void add_words(V::I (&dot)[2], V::I (&narrow)[2], const V::I (&factors)[2], const uint8_t* words,
                          const ActivationQ8* act, Prefetch prefetch) {
  constexpr int kGroups = Words::kSubColumns / 4;
  constexpr int kOfSet = group % Words::kSetGroups;
  const uint8_t* set = set_of<Words>(words, chunk, group);
  const V::I low = Words::template weights<2 * kOfSet>(set);
  const V::I high = Words::template weights<2 * kOfSet + 1>(set);
  prefetch_with_group<Words, kOfSet>(set, prefetch);
  touch(set + first_new_word<Words>(kOfSet + 1) * 64, prefetch);
  accumulate<Words::kNarrowGroups, group % kGroups, kGroups>(
      dot[0], narrow[0], low, V::broadcast_i(act[Words::block_of(chunk, 0)].q + 4 * group), factors[0]);
  accumulate<Words::kNarrowGroups, group % kGroups, kGroups>(
      dot[1], narrow[1], high, V::broadcast_i(act[Words::block_of(chunk, 1)].q + 4 * group), factors[1]);
  if constexpr ((group + 1) % kGroups != 0) {
    add_words<Words, chunk, group + 1>(dot, narrow, factors, words, act, prefetch);
  }
}

// sums[block % 4] = scale * dot of the blocks of a chunk, as add_sub_blocks; from sub-block `half` of two, or of one.
template <class Words, int chunk, int half, class Isa = V>
TKT_INLINE void add_chunk(V::I (&sums)[4], const typename Words::Scales& scales, const uint8_t* words,
                          const ActivationQ8* act, Prefetch prefetch) {
  constexpr int kHalves = 32 / Words::kSubColumns;
  constexpr int kBlocks[2] = {Words::block_of(chunk, 0), Words::block_of(chunk, 1)};
  constexpr int kSubBlocks[2] = {kBlocks[0] * kHalves + half, kBlocks[1] * kHalves + half};
  V::I dot[2] = {V::set_i(0), V::set_i(0)};
  V::I factors[2] = {V::set_i(kOnes), V::set_i(kOnes)};
  if constexpr (V::kFoldsScales) {
    factors[0] = scales.template scale_pair<kSubBlocks[0]>();
    factors[1] = scales.template scale_pair<kSubBlocks[1]>();
    if constexpr (half > 0) {
      TKT_UNROLL for (int n = 0; n < 2; ++n) dot[n] = sums[kBlocks[n] % 4];
    } else if constexpr (Words::kOffsetLog2 >= 0) {
      const V::I offsets[2] = {scales.template offset_pair<kBlocks[0], Words::kOffsetLog2>(),
                                 scales.template offset_pair<kBlocks[1], Words::kOffsetLog2>()};
      TKT_UNROLL for (int n = 0; n < 2; ++n) {
        dot[n] = Isa::widen_pairs(Isa::broadcast_pair(act[kBlocks[n]].neg_sum16), offsets[n]);
      }
    }
  } else if constexpr (Words::kOffsetLog2 >= 0) {
    TKT_UNROLL for (int n = 0; n < 2; ++n) {
      dot[n] = V::template shift_left<Words::kOffsetLog2>(V::broadcast_i(neg_sum_of<Words>(act[kBlocks[n]], half)));
    }
  }
  V::I narrow[2];
  if constexpr (half == 0) prefetch_burst(words, chunk * Words::kWords / 4, (chunk + 1) * Words::kWords / 4, prefetch);
  add_words<Words, chunk, half * Words::kSubColumns / 4>(dot, narrow, factors, words, act, prefetch);
  if constexpr (V::kFoldsScales) {
    // Nothing else ends these sums: Q6_K in cache, one core of Zen 3, 26 GB/s without this, 29 with it.
    TKT_UNROLL for (int n = 0; n < 2; ++n) dot[n] = Isa::chained(dot[n]);
  } else {
    dot[0] = V::mul_i(dot[0], scales.template scale<kSubBlocks[0]>());
    dot[1] = V::mul_i(dot[1], scales.template scale<kSubBlocks[1]>());
    if constexpr (half > 0) {
      TKT_UNROLL for (int n = 0; n < 2; ++n) dot[n] = V::add_i(sums[kBlocks[n] % 4], dot[n]);
    }
  }
  TKT_UNROLL for (int n = 0; n < 2; ++n) sums[kBlocks[n] % 4] = dot[n];
  if constexpr (half + 1 < kHalves) add_chunk<Words, chunk, half + 1>(sums, scales, words, act, prefetch);
}

// scaled += d * sum of the four blocks that two chunks have together.
template <class Words, int chunk>
TKT_INLINE void add_chunks(V::F& scaled, const typename Words::Scales& scales, const uint8_t* words,
                           const ActivationQ8* act, Prefetch prefetch) {
  V::I sums[4];
  add_chunk<Words, chunk, 0>(sums, scales, words, act, prefetch);
  add_chunk<Words, chunk + 1, 0>(sums, scales, words, act, prefetch);
  TKT_UNROLL for (int j = 0; j < 4; ++j) {
    scaled = V::fma(V::to_float(sums[j]), V::set_f(act[2 * chunk + j].d), scaled);
  }
}

template <class Words>
TKT_INLINE void dot_one_panel_k(const uint8_t* panel, int64_t blocks, const uint8_t* activations, float* out,
                                Prefetch prefetch) {
  using Scales = typename Words::Scales;
  const ActivationQ8* act = reinterpret_cast<const ActivationQ8*>(activations);
  V::F acc = V::zero_f();
  for (int64_t b = 0; b < blocks; ++b, act += 8) {
    const uint8_t* words = block_words<Words>(panel, blocks, b);
    if constexpr (Words::kScaleBytes > 0) prefetch_burst(block_scales<Words>(panel, b), 0, 1, prefetch);
    prefetch_next_activations<1>(act, blocks * 256);
    Scales scales;
    scales.read(words, block_scales<Words>(panel, b));
    TKT_UNROLL for (int word = 0; word < Words::kHeadWords; ++word) prefetch_line(words + word * 64, prefetch);
    V::F scaled = V::zero_f();
    add_chunks<Words, 0>(scaled, scales, words, act, prefetch);
    add_chunks<Words, 2>(scaled, scales, words, act, prefetch);
    acc = V::fma(scales.d, scaled, acc);
    if constexpr (Scales::kHasMinima) {
      V::F minima[1] = {V::zero_f()};
      add_minima<Scales, 1, 0>(minima, scales, 0, {act});
      add_minima<Scales, 1, 0>(minima, scales, 1, {act + 4});
      acc = V::fnma(scales.dmin, minima[0], acc);
    }
  }
  V::store(out, acc);
}

// ---- Float types: one fma per column. ------------------------------------------------------------------------------

template <class Words, int T, int R>
TKT_INLINE void dot_tile_float(const DotArgs& args, int token, Prefetch prefetch) {
  V::F acc[T][R];
  TKT_UNROLL for (int t = 0; t < T; ++t) {
    TKT_UNROLL for (int r = 0; r < R; ++r) acc[t][r] = V::zero_f();
  }
  const float* act[T];
  TKT_UNROLL for (int t = 0; t < T; ++t) act[t] = reinterpret_cast<const float*>(args.activations[token + t]);
  for (int64_t column = 0; column < args.blocks; ++column) {
    if (column * Words::kBytes % 64 == 0) {
      TKT_UNROLL for (int r = 0; r < R; ++r) prefetch_burst(args.panels[r] + column * Words::kBytes, 0, 1, prefetch);
    }
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

// ---- Any type -------------------------------------------------------------------------------------------------------

template <class Words, int T, int R>
TKT_INLINE void dot_tile(const DotArgs& args, int token, Prefetch prefetch) {
  if constexpr (Words::kColumns == 256) {
    dot_tile_k<Words, T, R>(args, token, prefetch);
  } else if constexpr (Words::kColumns == 32) {
    dot_tile_32<Words, T, R>(args, token, prefetch);
  } else {
    dot_tile_float<Words, T, R>(args, token, prefetch);
  }
}

static inline DotArgs one_panel(const DotArgs& args, int panel) {
  return {{args.panels[panel], nullptr}, 1, args.blocks, args.activations, args.tokens, args.out + panel * 16,
          args.prefetch};
}
