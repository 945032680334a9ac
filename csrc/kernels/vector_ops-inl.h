// Everything of a KernelTable that is not a dot product with panels, written once over an ISA's primitives. Same rules
// as panel_dot-inl.h: included inside an ISA's namespace, nowhere else.

static inline V::F exp_f(V::F x) {
  x = V::min(V::max(x, V::set_f(kExpMin)), V::set_f(kExpMax));
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

static inline float largest_lane(V::F x) {
  alignas(64) float lane[16];
  V::store(lane, x);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  }
  return lane[0];
}

static void quantize_q8(const float* x, int64_t cols, uint8_t* row) {
  ActivationQ8* blocks = reinterpret_cast<ActivationQ8*>(row);
  for (int64_t b = 0; b < cols / 32; ++b) {
    ActivationQ8& block = blocks[b];
    const V::F low = V::load(x + b * 32);
    const V::F high = V::load(x + b * 32 + 16);
    const float largest = largest_lane(V::max(V::abs(low), V::abs(high)));
    const bool is_zero = !(largest >= kSmallestAmax);
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

// Columns [first, end) of K keys at a time: K independent fma chains hide the latency, and the query vector is loaded once
// for all of them. A line of each row in `ahead` is asked for on the way.
template <int K>
static inline void score_columns(const float* query, const float* const* keys, const float* const* ahead, int first,
                                 int end, float* scores) {
  V::F acc[K];
  const float* rows[K];
  TKT_UNROLL for (int k = 0; k < K; ++k) {
    acc[k] = V::load(scores + k * 16);
    rows[k] = keys[k];
  }
  int i = first;
  for (; i + 16 <= end; i += 16) {
    TKT_UNROLL for (int k = 0; k < K; ++k) V::prefetch(ahead[k] + i);
    TKT_UNROLL for (int column = 0; column < 16; ++column) {
      const V::F q = V::load(query + (i + column) * 16);
      TKT_UNROLL for (int k = 0; k < K; ++k) acc[k] = V::fma(q, V::set_f(rows[k][i + column]), acc[k]);
    }
  }
  for (; i < end; ++i) {
    const V::F q = V::load(query + i * 16);
    TKT_UNROLL for (int k = 0; k < K; ++k) acc[k] = V::fma(q, V::set_f(rows[k][i]), acc[k]);
  }
  TKT_UNROLL for (int k = 0; k < K; ++k) V::store(scores + k * 16, acc[k]);
}

// scores[key] += query * rows[key] over `dim` columns, in order. Blocked so that what is used again stays in L1: 128 columns
// of 16 queries are 8 KB (all 576 of DeepSeek are 36), and the rows of the next 32 keys arrive while these are worked on.
// One core of Zen 5, keys from memory: 103 GFLOPS without blocks, 144 with, 161 with the rows ahead; from L2 175.
static inline void score_rows(const float* query, const float* const* rows, int keys, int keys_ahead, int dim,
                              float* scores) {
  constexpr int kColumns = 128;
  constexpr int kKeys = 32;
  constexpr int kAtOnce = V::kScoreKeys;
  for (int block = 0; block < keys; block += kKeys) {
    const int block_end = block + kKeys < keys ? block + kKeys : keys;
    for (int first = 0; first < dim; first += kColumns) {
      const int end = first + kColumns < dim ? first + kColumns : dim;
      int key = block;
      for (; key + kAtOnce <= block_end; key += kAtOnce) {
        const bool has_ahead = key + kKeys + kAtOnce <= keys + keys_ahead;
        score_columns<kAtOnce>(query, rows + key, rows + key + (has_ahead ? kKeys : 0), first, end, scores + key * 16);
      }
      for (; key < block_end; ++key) score_columns<1>(query, rows + key, rows + key, first, end, scores + key * 16);
    }
  }
}

template <int N>
static inline void sum_latents(const AttentionSplitArgs& args, int dim) {
  V::F acc[N];
  TKT_UNROLL for (int i = 0; i < N; ++i) acc[i] = V::zero_f();
  for (int key = 0; key < args.keys; ++key) {
    const V::F weight = V::load(args.weights + key * 16);
    const float* row = args.latents[key] + dim;
    TKT_UNROLL for (int i = 0; i < N; ++i) acc[i] = V::fma(weight, V::set_f(row[i]), acc[i]);
  }
  TKT_UNROLL for (int i = 0; i < N; ++i) V::store(args.context + (dim + i) * 16, acc[i]);
}

static void attend_split(const AttentionSplitArgs& args) {
  for (int key = 0; key < args.keys; ++key) V::store(args.weights + key * 16, V::zero_f());
  score_rows(args.query, args.latents, args.keys, args.keys_ahead, args.latent_dim, args.weights);
  score_rows(args.query + args.latent_dim * 16, args.ropes, args.keys, args.keys_ahead, args.rope_dim, args.weights);

  V::F largest = V::load(args.weights);
  for (int key = 1; key < args.keys; ++key) largest = V::max(largest, V::load(args.weights + key * 16));
  V::F sum = V::zero_f();
  for (int key = 0; key < args.keys; ++key) {
    const V::F weight = exp_f(V::sub(V::load(args.weights + key * 16), largest));
    V::store(args.weights + key * 16, weight);
    sum = V::add(sum, weight);
  }
  V::store(args.max, largest);
  V::store(args.sum, sum);

  int dim = 0;
  for (; dim + V::kSumDims <= args.latent_dim; dim += V::kSumDims) sum_latents<V::kSumDims>(args, dim);
  for (; dim < args.latent_dim; ++dim) sum_latents<1>(args, dim);
}

static void merge_split(const float* split_max, const float* split_sum, const float* split_context, int latent_dim,
                        float* max, float* sum, float* context) {
  const V::F old_max = V::load(max);
  const V::F add_max = V::load(split_max);
  const V::F new_max = V::max(old_max, add_max);
  const V::F keep = exp_f(V::sub(old_max, new_max));
  const V::F add = exp_f(V::sub(add_max, new_max));
  V::store(max, new_max);
  V::store(sum, V::fma(V::load(split_sum), add, V::mul(V::load(sum), keep)));
  for (int i = 0; i < latent_dim; ++i) {
    V::store(context + i * 16, V::fma(V::load(split_context + i * 16), add, V::mul(V::load(context + i * 16), keep)));
  }
}
