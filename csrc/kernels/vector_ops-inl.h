// Everything of a KernelTable that is not a dot product with panels, written once over an ISA's primitives. Same rules
// as panel_dot-inl.h: included inside an ISA's namespace, nowhere else.

static inline V::F exp_f(V::F x) {
  // x stands second: where either is NaN, max and min give the second, and exp(NaN) is NaN.
  x = V::min(V::set_f(kExpMax), V::max(V::set_f(kExpMin), x));
  const V::I n = V::to_int(V::mul(x, V::set_f(kLog2e)));
  const V::F nf = V::to_float(n);
  V::F r = V::fma(nf, V::set_f(-kLn2High), x);
  r = V::fma(nf, V::set_f(-kLn2Low), r);
  V::F p = V::set_f(kExpPoly[0]);
  TKT_UNROLL for (int i = 1; i < 6; ++i) p = V::fma(p, r, V::set_f(kExpPoly[i]));
  const V::F y = V::add(V::fma(p, V::mul(r, r), r), V::set_f(1.0f));
  return V::mul(y, V::bits_to_float(V::template shift_left<23>(V::add_i(n, V::set_i(127)))));
}

// Loads past a row's end would read foreign memory: a short tail goes through a zero-filled buffer.
static inline V::F load_tail(const float* x, int64_t n) {
  alignas(64) float buffer[16] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = x[i];
  return V::load(buffer);
}

static inline void store_tail(float* out, V::F value, int64_t n) {
  alignas(64) float buffer[16];
  V::store(buffer, value);
  for (int64_t i = 0; i < n; ++i) out[i] = buffer[i];
}

// int8 has no NaN: the scale carries it into every product with the block.
static inline void mark_as_nan(ActivationQ8& block) {
  block = {};
  block.d = block.d_sum = __builtin_nanf("");
}

static void quantize_q8(const float* x, int64_t cols, uint8_t* row) {
  ActivationQ8* blocks = reinterpret_cast<ActivationQ8*>(row);
  for (int64_t b = 0; b < cols / 32; ++b) {
    ActivationQ8& block = blocks[b];
    const V::F low = V::load(x + b * 32);
    const V::F high = V::load(x + b * 32 + 16);
    // As integers magnitudes have the order that they have as floats, and NaN is above infinity: neither gets lost.
    const V::I magnitudes = V::max_i(V::float_to_bits(V::abs(low)), V::float_to_bits(V::abs(high)));
    const int32_t largest_bits = V::largest_lane_i(magnitudes);
    float largest;
    __builtin_memcpy(&largest, &largest_bits, sizeof(largest));
    if (__builtin_expect(!(largest < __builtin_inff()), 0)) {
      mark_as_nan(block);
      continue;
    }
    const bool is_zero = largest < kSmallestAmax;
    const V::F inverse = V::set_f(is_zero ? 0.0f : 127.0f / largest);
    const V::I low_q = V::to_int(V::mul(low, inverse));
    const V::I high_q = V::to_int(V::mul(high, inverse));
    V::store_i8(block.q, low_q);
    V::store_i8(block.q + 16, high_q);
    block.d = is_zero ? 0.0f : largest / 127.0f;
    block.neg_sum16[0] = -V::sum_of_lanes(low_q);
    block.neg_sum16[1] = -V::sum_of_lanes(high_q);
    block.neg_sum = block.neg_sum16[0] + block.neg_sum16[1];
    block.d_sum = block.d * static_cast<float>(-block.neg_sum);
  }
}

static void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  V::F squares = V::zero_f();
  const int64_t whole = n / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) {
    const V::F v = V::load(x + i);
    squares = V::fma(v, v, squares);
  }
  if (whole < n) {
    const V::F v = load_tail(x + whole, n - whole);
    squares = V::fma(v, v, squares);
  }
  alignas(64) float lane[16];
  V::store(lane, squares);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = lane[i] + lane[i + width];
  }
  const V::F scale = V::set_f(1.0f / __builtin_sqrtf(lane[0] / static_cast<float>(n) + eps));
  for (int64_t i = 0; i < whole; i += 16) {
    V::store(out + i, V::mul(V::load(weight + i), V::mul(V::load(x + i), scale)));
  }
  if (whole < n) {
    const V::F v = V::mul(load_tail(weight + whole, n - whole), V::mul(load_tail(x + whole, n - whole), scale));
    store_tail(out + whole, v, n - whole);
  }
}

static inline V::F swiglu_f(V::F gate, V::F up) {
  const V::F one = V::set_f(1.0f);
  return V::mul(V::div(gate, V::add(one, exp_f(V::sub(V::zero_f(), gate)))), up);
}

static void swiglu(const float* gate, const float* up, int64_t n, float* out) {
  const int64_t whole = n / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) V::store(out + i, swiglu_f(V::load(gate + i), V::load(up + i)));
  if (whole < n) {
    store_tail(out + whole, swiglu_f(load_tail(gate + whole, n - whole), load_tail(up + whole, n - whole)), n - whole);
  }
}

static void exp_minus(const float* x, float offset, int64_t n, float* out) {
  const V::F minus = V::set_f(offset);
  const int64_t whole = n / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) V::store(out + i, exp_f(V::sub(V::load(x + i), minus)));
  if (whole < n) store_tail(out + whole, exp_f(V::sub(load_tail(x + whole, n - whole), minus)), n - whole);
}

static void add_scaled(const float* x, float scale, int64_t n, float* out) {
  const V::F s = V::set_f(scale);
  const int64_t whole = n / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) V::store(out + i, V::fma(s, V::load(x + i), V::load(out + i)));
  if (whole < n) {
    const V::F v = V::fma(s, load_tail(x + whole, n - whole), load_tail(out + whole, n - whole));
    store_tail(out + whole, v, n - whole);
  }
}

// Columns [first, end) of K keys times those of M groups of queries: M * K independent fma chains hide the latency, and
// each vector is loaded once for all of them. What lies `ahead` floats after it is asked for on the way.
template <int M, int K>
static inline void score_columns(const float* query, int query_stride, const float* const* keys, int64_t ahead,
                                 int first, int end, float* scores) {
  // With one group there is a load for every fma, and a little more: some keys are loaded four columns at a time and
  // broadcast by shuffles.
  constexpr int kShuffled = M == 1 && K > V::kShuffledKeys ? V::kShuffledKeys : 0;
  V::F acc[M][K];
  const float* rows[K];
  TKT_UNROLL for (int k = 0; k < K; ++k) {
    TKT_UNROLL for (int m = 0; m < M; ++m) acc[m][k] = V::load(scores + (m * kAttentionSplitKeys + k) * 16);
    rows[k] = keys[k];
  }
  const auto add_key = [&](int k, int i, V::F value) {
    TKT_UNROLL for (int m = 0; m < M; ++m) {
      acc[m][k] = V::fma(V::load(query + m * query_stride + i * 16), value, acc[m][k]);
    }
  };
  int i = first;
  for (; i + 16 <= end; i += 16) {
    TKT_UNROLL for (int k = 0; k < K; ++k) V::prefetch_to_l2(rows[k] + (ahead + i));
    TKT_UNROLL for (int four = i; four < i + 16; four += 4) {
      V::F columns[kShuffled + 1];
      TKT_UNROLL for (int k = 0; k < kShuffled; ++k) columns[k] = V::load_four(rows[k] + four);
      TKT_UNROLL for (int c = 0; c < 4; ++c) {
        TKT_UNROLL for (int k = 0; k < kShuffled; ++k) add_key(k, four + c, V::one_of_four(columns[k], c));
        TKT_UNROLL for (int k = kShuffled; k < K; ++k) add_key(k, four + c, V::set_f(rows[k][four + c]));
      }
    }
  }
  for (; i < end; ++i) {
    TKT_UNROLL for (int k = 0; k < K; ++k) add_key(k, i, V::set_f(rows[k][i]));
  }
  TKT_UNROLL for (int k = 0; k < K; ++k) {
    TKT_UNROLL for (int m = 0; m < M; ++m) V::store(scores + (m * kAttentionSplitKeys + k) * 16, acc[m][k]);
  }
}

// The rows of a split, and those that will be wanted after it.
struct Rows {
  const float* const* here;
  int keys;
  const float* const* next;
  int next_keys;

  // How many floats after row `key` the row that comes `distance` rows later is; rows of a cache are evenly spaced, so
  // that this holds for its neighbours too.
  int64_t ahead(int key, int distance) const {
    const int later = key + distance;
    if (later < keys) return here[later] - here[key];
    return later - keys < next_keys ? next[later - keys] - here[key] : 0;
  }
};

// scores[group][key] += query * rows[key] over `dim` columns, in order, of M groups. Blocked so that what is used again
// stays in L1: 128 columns of 16 queries are 8 KB (all 576 of DeepSeek are 36), and the rows of the next 32 keys arrive
// in L2 while these are worked on. Whole splits, keys from memory, without asking ahead, with lines asked for L1, for
// L2: two cores of Zen 4 140, 170, 200 GFLOPS (of 234); one core of Zen 5 190, 198, not measured. There 16 keys at a
// time take 230 GFLOPS from L2 and 170 from memory, 8 keys 215 from L2.
template <int M, int K>
static inline void score_rows(const float* query, int query_stride, const Rows& rows, int dim, float* scores) {
  constexpr int kColumns = 128;
  constexpr int kKeys = 32;
  for (int block = 0; block < rows.keys; block += kKeys) {
    const int block_end = block + kKeys < rows.keys ? block + kKeys : rows.keys;
    for (int first = 0; first < dim; first += kColumns) {
      const int end = first + kColumns < dim ? first + kColumns : dim;
      int key = block;
      for (; key + K <= block_end; key += K) {
        score_columns<M, K>(query, query_stride, rows.here + key, rows.ahead(key, kKeys), first, end,
                            scores + key * 16);
      }
      for (; key < block_end; ++key) {
        score_columns<M, 1>(query, query_stride, rows.here + key, 0, first, end, scores + key * 16);
      }
    }
  }
}

template <int M, int K>
static inline void score_groups(const AttentionSplitArgs& args, int group, int keys) {
  const int width = args.latent_dim + args.rope_dim;
  const float* query = args.query + group * width * 16;
  float* scores = args.scores + group * kAttentionSplitKeys * 16;
  for (int m = 0; m < M; ++m) {
    for (int key = 0; key < keys; ++key) V::store(scores + (m * kAttentionSplitKeys + key) * 16, V::zero_f());
  }
  const Rows latents{args.latents, keys, args.latents_ahead, args.keys_ahead};
  const Rows ropes{args.ropes, keys, args.ropes_ahead, args.keys_ahead};
  score_rows<M, K>(query, width * 16, latents, args.latent_dim, scores);
  score_rows<M, K>(query + args.latent_dim * 16, width * 16, ropes, args.rope_dim, scores);
}

// What 16 heads have of a softmax state beside the context.
struct MaxAndSum {
  V::F max;
  V::F sum;
};

// weights = exp(scores - their max). Four maxima, because each waits for the one before; a largest value has no order.
static inline MaxAndSum weigh(const float* scores, int keys, float* weights) {
  V::F largest[4];
  TKT_UNROLL for (int i = 0; i < 4; ++i) largest[i] = V::load(scores);
  int first = 0;
  for (; first + 4 <= keys; first += 4) {
    TKT_UNROLL for (int i = 0; i < 4; ++i) largest[i] = V::max(largest[i], V::load(scores + (first + i) * 16));
  }
  for (; first < keys; ++first) largest[0] = V::max(largest[0], V::load(scores + first * 16));
  const V::F max = V::max(V::max(largest[0], largest[1]), V::max(largest[2], largest[3]));
  V::F sum = V::zero_f();
  for (int key = 0; key < keys; ++key) {
    const V::F weight = exp_f(V::sub(V::load(scores + key * 16), max));
    V::store(weights + key * 16, weight);
    sum = V::add(sum, weight);
  }
  return {max, sum};
}

// context[head][column] = sum of weights[key][head] * rows[key][column] over keys in order, for H heads and N vectors
// of columns. A lane is a column here: one vector of a row serves H heads and one weight N vectors, 10 loads for 16
// fma; with a lane per head it takes 17 (154 GFLOPS on one core of Zen 5, rows in L2; this 240).
template <int N, int H>
static inline void sum_columns(const float* weights, const float* const* rows, int keys, int column, int stride,
                               float* context) {
  V::F acc[H][N];
  TKT_UNROLL for (int h = 0; h < H; ++h) TKT_UNROLL for (int n = 0; n < N; ++n) acc[h][n] = V::zero_f();
  for (int key = 0; key < keys; ++key) {
    V::F latents[N];
    TKT_UNROLL for (int n = 0; n < N; ++n) latents[n] = V::load(rows[key] + column + n * 16);
    TKT_UNROLL for (int h = 0; h < H; ++h) {
      const V::F weight = V::set_f(weights[key * 16 + h]);
      TKT_UNROLL for (int n = 0; n < N; ++n) acc[h][n] = V::fma(weight, latents[n], acc[h][n]);
    }
  }
  TKT_UNROLL for (int h = 0; h < H; ++h) {
    TKT_UNROLL for (int n = 0; n < N; ++n) V::store(context + h * stride + column + n * 16, acc[h][n]);
  }
}

template <int N>
static inline void sum_heads(const float* weights, const float* const* rows, int keys, int column, int stride,
                             float* context) {
  constexpr int kHeads = V::kSumHeads;
  int h = 0;
  for (; h + kHeads <= 16; h += kHeads) {
    sum_columns<N, kHeads>(weights + h, rows, keys, column, stride, context + h * stride);
  }
  constexpr int kLeft = 16 % kHeads;
  if constexpr (kLeft > 0) sum_columns<N, kLeft>(weights + h, rows, keys, column, stride, context + h * stride);
}

static inline void sum_one_column(const float* weights, const float* const* rows, int keys, int column, int stride,
                                  float* context) {
  V::F acc = V::zero_f();
  for (int key = 0; key < keys; ++key) {
    acc = V::fma(V::load(weights + key * 16), V::set_f(rows[key][column]), acc);
  }
  alignas(64) float lane[16];
  V::store(lane, acc);
  for (int h = 0; h < 16; ++h) context[h * stride + column] = lane[h];
}

static void score_split(const AttentionSplitArgs& args) {
  int most_keys = 0;
  for (int g = 0; g < args.groups; ++g) most_keys = args.keys[g] > most_keys ? args.keys[g] : most_keys;
  // Scores past the keys that a group sees are computed with the others and left alone.
  int group = 0;
  constexpr int kTogether = V::kScoreGroups;
  for (; group + kTogether <= args.groups; group += kTogether) {
    score_groups<kTogether, V::kGroupedScoreKeys>(args, group, most_keys);
  }
  for (; group < args.groups; ++group) score_groups<1, V::kScoreKeys>(args, group, args.keys[group]);
}

static void sum_split(const AttentionSplitArgs& args, int first, int end) {
  const int dim = args.latent_dim;
  const auto weights_of = [&](int g) { return args.weights + g * kAttentionSplitKeys * 16; };
  const auto state_of = [&](int g) { return args.states + g * attention_state_floats(dim); };
  for (int g = 0; g < args.groups; ++g) {
    const MaxAndSum of_g = weigh(args.scores + g * kAttentionSplitKeys * 16, args.keys[g], weights_of(g));
    if (first > 0) continue;
    V::store(state_of(g), of_g.max);
    V::store(state_of(g) + 16, of_g.sum);
  }

  constexpr int kWide = V::kSumVectors;
  int column = first;
  for (; column + kWide * 16 <= end; column += kWide * 16) {
    for (int g = 0; g < args.groups; ++g) {
      sum_heads<kWide>(weights_of(g), args.latents, args.keys[g], column, dim, state_of(g) + 32);
    }
  }
  for (; column + 16 <= end; column += 16) {
    for (int g = 0; g < args.groups; ++g) {
      sum_heads<1>(weights_of(g), args.latents, args.keys[g], column, dim, state_of(g) + 32);
    }
  }
  for (; column < end; ++column) {
    for (int g = 0; g < args.groups; ++g) {
      sum_one_column(weights_of(g), args.latents, args.keys[g], column, dim, state_of(g) + 32);
    }
  }
}

static void merge_split(const float* split, int latent_dim, int first, int count, float* state) {
  const V::F old_max = V::load(state);
  const V::F add_max = V::load(split);
  const V::F new_max = V::max(old_max, add_max);
  const V::F keep = exp_f(V::sub(old_max, new_max));
  const V::F add = exp_f(V::sub(add_max, new_max));
  V::store(state, new_max);
  V::store(state + 16, V::fma(V::load(split + 16), add, V::mul(V::load(state + 16), keep)));
  alignas(64) float keep_of[16];
  alignas(64) float add_of[16];
  V::store(keep_of, keep);
  V::store(add_of, add);
  const int whole = latent_dim / 16 * 16;
  for (int h = first; h < first + count; ++h) {
    const V::F head_keep = V::set_f(keep_of[h]);
    const V::F head_add = V::set_f(add_of[h]);
    const float* from = split + 32 + h * latent_dim;
    float* to = state + 32 + (h - first) * latent_dim;
    for (int i = 0; i < whole; i += 16) {
      V::store(to + i, V::fma(V::load(from + i), head_add, V::mul(V::load(to + i), head_keep)));
    }
    if (whole < latent_dim) {
      const V::F tail = V::mul(load_tail(to + whole, latent_dim - whole), head_keep);
      store_tail(to + whole, V::fma(load_tail(from + whole, latent_dim - whole), head_add, tail), latent_dim - whole);
    }
  }
}
