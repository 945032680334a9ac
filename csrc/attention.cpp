#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "linear.h"
#include "thread_pool.h"

namespace tkt {
namespace {

constexpr int64_t kLanes = 16;
// Bounds the intermediate results of a long prompt (V3: 256 tokens x 128 heads x 576 floats = 75 MB).
constexpr int64_t kChunkTokens = 256;

// DeepSeek pairs neighbours: (x0, x1), (x2, x3), ... share an angle.
void rotate(const float* table, int64_t dim, const float* x, float* out) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float even = x[2 * i];
    const float odd = x[2 * i + 1];
    out[2 * i] = even * table[i] - odd * table[half + i];
    out[2 * i + 1] = odd * table[i] + even * table[half + i];
  }
}

void check_shape(const std::shared_ptr<PackedMatrix>& w, const char* name, int64_t count, int64_t rows, int64_t cols) {
  if (w != nullptr && w->count() == count && w->rows() == rows && w->cols() == cols) return;
  std::string found = "nothing";
  if (w != nullptr) {
    found = std::to_string(w->count()) + " x " + std::to_string(w->rows()) + " x " + std::to_string(w->cols());
  }
  throw std::invalid_argument(std::string(name) + " must be " + std::to_string(count) + " x " + std::to_string(rows) +
                              " x " + std::to_string(cols) + ", got " + found);
}

// Pointers to the rows of the keys that one query sees, in order.
struct VisibleKeys {
  std::vector<const float*> latents;
  std::vector<const float*> ropes;

  void reserve(int64_t keys) {
    latents.reserve(static_cast<size_t>(keys));
    ropes.reserve(static_cast<size_t>(keys));
  }
  void add(const LatentCache& cache, int64_t sequence, int64_t key) {
    latents.push_back(cache.latents + sequence * cache.latent_batch_stride + key * cache.latent_stride);
    ropes.push_back(cache.ropes + sequence * cache.rope_batch_stride + key * cache.rope_stride);
  }
};

VisibleKeys visible_keys(const LatentCache& cache, const Visibility& visibility, int64_t sequence, int64_t query) {
  VisibleKeys keys;
  if (visibility.ranges != nullptr) {
    const int64_t start = std::max<int64_t>(0, visibility.ranges[2 * query]);
    const int64_t end = std::min<int64_t>(cache.length, visibility.ranges[2 * query + 1]);
    keys.reserve(std::max<int64_t>(0, end - start));
    for (int64_t key = start; key < end; ++key) keys.add(cache, sequence, key);
    return keys;
  }
  for (int64_t key = 0; key < cache.length; ++key) {
    if (visibility.mask[query * cache.length + key] != 0) keys.add(cache, sequence, key);
  }
  return keys;
}

// Running softmax state of 16 heads: max[16], sum[16], context[latent_dim][16].
int64_t state_size(int64_t latent_dim) { return (2 + latent_dim) * kLanes; }

void clear_state(float* state, int64_t latent_dim) {
  std::fill_n(state, kLanes, -INFINITY);
  std::fill_n(state + kLanes, (1 + latent_dim) * kLanes, 0.0f);
}

// Queries of 16 heads, lane = head, scaled; heads past the last are zero.
void transpose_queries(const AttentionConfig& c, const float* queries, int64_t first_head, float* out) {
  const int64_t width = c.latent_dim + c.rope_dim;
  const int64_t heads = std::min(kLanes, c.heads - first_head);
  if (heads < kLanes) std::fill_n(out, width * kLanes, 0.0f);
  for (int64_t h = 0; h < heads; ++h) {
    const float* q = queries + (first_head + h) * width;
    for (int64_t i = 0; i < width; ++i) out[i * kLanes + h] = q[i] * c.softmax_scale;
  }
}

void attend_keys(const KernelTable& table, const AttentionConfig& c, const float* query, const VisibleKeys& keys,
                 int64_t first, int64_t count, float* scratch, float* state) {
  AttentionSplitArgs args;
  args.query = query;
  args.latents = keys.latents.data() + first;
  args.ropes = keys.ropes.data() + first;
  args.keys = static_cast<int>(count);
  args.keys_ahead = static_cast<int>(static_cast<int64_t>(keys.latents.size()) - first - count);
  args.latent_dim = static_cast<int>(c.latent_dim);
  args.rope_dim = static_cast<int>(c.rope_dim);
  args.weights = scratch;
  args.max = state;
  args.sum = state + kLanes;
  args.context = state + 2 * kLanes;
  table.attend_split(args);
}

// A range of the latent's columns.
struct Columns {
  int64_t first;
  int64_t count;
};

// Merges those columns of a split into a state that holds no others.
void merge(const KernelTable& table, const Columns& columns, const float* split, float* state) {
  table.merge_split(split, split + kLanes, split + (2 + columns.first) * kLanes, static_cast<int>(columns.count), state,
                    state + kLanes, state + 2 * kLanes);
}

void write_context(const AttentionConfig& c, const Columns& columns, const float* state, int64_t first_head,
                   bool sees_keys, float* contexts) {
  const int64_t heads = std::min(kLanes, c.heads - first_head);
  for (int64_t h = 0; h < heads; ++h) {
    float* out = contexts + (first_head + h) * c.latent_dim + columns.first;
    for (int64_t i = 0; i < columns.count; ++i) {
      out[i] = sees_keys ? state[(2 + i) * kLanes + h] / state[kLanes + h] : 0.0f;
    }
  }
}

}  // namespace

MlaAttention::MlaAttention(const AttentionConfig& config, AttentionWeights weights)
    : config_(config), weights_(std::move(weights)) {
  const AttentionConfig& c = config_;
  int64_t query_inputs = c.hidden;
  if (weights_.q_a != nullptr) {
    query_inputs = weights_.q_a->rows();
    check_shape(weights_.q_a, "q_a_proj", 1, query_inputs, c.hidden);
    if (static_cast<int64_t>(weights_.q_a_norm.size()) != query_inputs) {
      throw std::invalid_argument("q_a_layernorm must have " + std::to_string(query_inputs) + " values, got " +
                                  std::to_string(weights_.q_a_norm.size()));
    }
  }
  check_shape(weights_.q, "q_proj or q_b_proj", 1, c.heads * (c.nope_dim + c.rope_dim), query_inputs);
  check_shape(weights_.kv_a, "kv_a_proj_with_mqa", 1, c.latent_dim + c.rope_dim, c.hidden);
  check_shape(weights_.k_b, "k_b", c.heads, c.latent_dim, c.nope_dim);
  check_shape(weights_.v_b, "v_b", c.heads, c.value_dim, c.latent_dim);
  check_shape(weights_.o, "o_proj", 1, c.hidden, c.heads * c.value_dim);
  if (static_cast<int64_t>(weights_.kv_a_norm.size()) != c.latent_dim || c.rope_dim % 2 != 0) {
    throw std::invalid_argument("kv_a_layernorm must have " + std::to_string(c.latent_dim) + " values, got " +
                                std::to_string(weights_.kv_a_norm.size()) + "; rope_dim must be even, got " +
                                std::to_string(c.rope_dim));
  }
}

void MlaAttention::project_keys(const float* x, const float* rope_table, int64_t batch, int64_t tokens,
                                const KeyRows& keys) const {
  const AttentionConfig& c = config_;
  const int64_t width = c.latent_dim + c.rope_dim;
  const ScratchBuffer compressed(static_cast<size_t>(batch * tokens * width) * sizeof(float));
  linear(*weights_.kv_a, 0, x, batch * tokens, compressed.floats());
  const KernelTable& table = kernels();
  parallel_for(batch * tokens, [&](int64_t row) {
    const int64_t sequence = row / tokens;
    const int64_t t = row % tokens;
    const float* from = compressed.floats() + row * width;
    table.rms_norm(from, weights_.kv_a_norm.data(), c.norm_eps, c.latent_dim,
                   keys.latents + sequence * keys.latent_batch_stride + t * keys.latent_stride);
    rotate(rope_table + row * c.rope_dim, c.rope_dim, from + c.latent_dim,
           keys.ropes + sequence * keys.rope_batch_stride + t * keys.rope_stride);
  });
}

void MlaAttention::absorbed_queries(const float* x, const float* rope_table, int64_t tokens, float* queries) const {
  const AttentionConfig& c = config_;
  const KernelTable& table = kernels();
  const int64_t head_dim = c.nope_dim + c.rope_dim;
  const int64_t width = c.latent_dim + c.rope_dim;
  const ScratchBuffer plain(static_cast<size_t>(tokens * c.heads * head_dim) * sizeof(float));
  if (weights_.q_a != nullptr) {
    const int64_t rank = weights_.q_a->rows();
    const ScratchBuffer compressed(static_cast<size_t>(tokens * rank) * sizeof(float));
    linear(*weights_.q_a, 0, x, tokens, compressed.floats());
    parallel_for(tokens, [&](int64_t t) {
      float* row = compressed.floats() + t * rank;
      table.rms_norm(row, weights_.q_a_norm.data(), c.norm_eps, rank, row);
    });
    linear(*weights_.q, 0, compressed.floats(), tokens, plain.floats());
  } else {
    linear(*weights_.q, 0, x, tokens, plain.floats());
  }
  parallel_for(tokens, [&](int64_t t) {
    for (int64_t h = 0; h < c.heads; ++h) {
      const float* rope_part = plain.floats() + (t * c.heads + h) * head_dim + c.nope_dim;
      rotate(rope_table + t * c.rope_dim, c.rope_dim, rope_part, queries + (t * c.heads + h) * width + c.latent_dim);
    }
  });
  // Row t * heads + h of the quantized activations is head h of token t; k_b takes them head by head.
  const Activations nope(weights_.k_b->info().activation, plain.floats(), tokens * c.heads, c.nope_dim, head_dim);
  std::vector<const uint8_t*> rows(static_cast<size_t>(tokens * c.heads));
  std::vector<LinearTask> tasks;
  for (int64_t h = 0; h < c.heads; ++h) {
    const uint8_t** head_rows = rows.data() + h * tokens;
    for (int64_t t = 0; t < tokens; ++t) head_rows[t] = nope.row(t * c.heads + h);
    tasks.push_back({weights_.k_b.get(), h, head_rows, tokens, queries + h * width, c.heads * width});
  }
  run_linears(tasks);
}

void MlaAttention::contexts(const float* queries, int64_t first_token, int64_t tokens, int64_t tokens_per_sequence,
                            const LatentCache& cache, const Visibility& visibility, float* contexts) const {
  const AttentionConfig& c = config_;
  const KernelTable& table = kernels();
  const int64_t width = c.latent_dim + c.rope_dim;
  const int64_t groups = (c.heads + kLanes - 1) / kLanes;
  const int64_t state_floats = state_size(c.latent_dim);
  const int64_t scratch_floats = kAttentionSplitKeys * kLanes;
  const Columns whole{0, c.latent_dim};
  const auto keys_of = [&](int64_t t) {
    const int64_t query = first_token + t;
    return visible_keys(cache, visibility, query / tokens_per_sequence, query);
  };

  // Many queries: one task each, splits in order. Few: splits in parallel, then merged in the same order, so that both
  // ways give the same bits.
  constexpr int64_t kFewTasks = 64;
  if (tokens * groups >= kFewTasks) {
    parallel_for(tokens * groups, [&](int64_t task) {
      const int64_t t = task / groups;
      const int64_t head = task % groups * kLanes;
      const VisibleKeys keys = keys_of(t);
      const int64_t count = static_cast<int64_t>(keys.latents.size());
      const ScratchBuffer buffer(static_cast<size_t>(width * kLanes + 2 * state_floats + scratch_floats) *
                                 sizeof(float));
      float* query = buffer.floats();
      float* state = query + width * kLanes;
      float* split = state + state_floats;
      float* scratch = split + state_floats;
      transpose_queries(c, queries + t * c.heads * width, head, query);
      clear_state(state, c.latent_dim);
      for (int64_t first = 0; first < count; first += kAttentionSplitKeys) {
        attend_keys(table, c, query, keys, first, std::min<int64_t>(kAttentionSplitKeys, count - first), scratch,
                    split);
        merge(table, whole, split, state);
      }
      write_context(c, whole, state, head, count > 0, contexts + t * c.heads * c.latent_dim);
    });
    return;
  }

  std::vector<VisibleKeys> keys;
  std::vector<int64_t> first_split = {0};  // of each token, counted in splits
  for (int64_t t = 0; t < tokens; ++t) {
    keys.push_back(keys_of(t));
    const int64_t count = static_cast<int64_t>(keys.back().latents.size());
    first_split.push_back(first_split.back() + (count + kAttentionSplitKeys - 1) / kAttentionSplitKeys);
  }
  const int64_t splits = first_split.back();
  const ScratchBuffer transposed(static_cast<size_t>(tokens * groups * width * kLanes) * sizeof(float));
  parallel_for(tokens * groups, [&](int64_t task) {
    transpose_queries(c, queries + task / groups * c.heads * width, task % groups * kLanes,
                      transposed.floats() + task * width * kLanes);
  });
  const ScratchBuffer partial(static_cast<size_t>(splits * groups * state_floats) * sizeof(float));
  parallel_for(splits * groups, [&](int64_t task) {
    const int64_t split = task / groups;
    const int64_t group = task % groups;
    const int64_t t = std::upper_bound(first_split.begin(), first_split.end(), split) - first_split.begin() - 1;
    const VisibleKeys& seen = keys[static_cast<size_t>(t)];
    const int64_t first = (split - first_split[static_cast<size_t>(t)]) * kAttentionSplitKeys;
    const int64_t count = std::min<int64_t>(kAttentionSplitKeys, static_cast<int64_t>(seen.latents.size()) - first);
    const ScratchBuffer scratch(static_cast<size_t>(scratch_floats) * sizeof(float));
    attend_keys(table, c, transposed.floats() + (t * groups + group) * width * kLanes, seen, first, count,
                scratch.floats(), partial.floats() + task * state_floats);
  });
  // At 4,096 keys the splits of a token are 1 MB: merged by one thread they would hold up the others. A few are merged
  // sooner than another thread gets to it.
  constexpr int64_t kFewSplits = 4;
  const int64_t merged_columns = splits > kFewSplits * tokens * groups ? 64 : c.latent_dim;
  const int64_t ranges = (c.latent_dim + merged_columns - 1) / merged_columns;
  parallel_for(tokens * groups * ranges, [&](int64_t task) {
    const int64_t t = task / ranges / groups;
    const int64_t group = task / ranges % groups;
    const int64_t column = task % ranges * merged_columns;
    const Columns columns{column, std::min(merged_columns, c.latent_dim - column)};
    const ScratchBuffer buffer(static_cast<size_t>(state_size(columns.count)) * sizeof(float));
    float* state = buffer.floats();
    clear_state(state, columns.count);
    const int64_t begin = first_split[static_cast<size_t>(t)];
    const int64_t end = first_split[static_cast<size_t>(t) + 1];
    for (int64_t split = begin; split < end; ++split) {
      merge(table, columns, partial.floats() + (split * groups + group) * state_floats, state);
    }
    write_context(c, columns, state, group * kLanes, end > begin, contexts + t * c.heads * c.latent_dim);
  });
}

void MlaAttention::output(const float* contexts, int64_t tokens, float* out) const {
  const AttentionConfig& c = config_;
  const Activations quantized(weights_.v_b->info().activation, contexts, tokens * c.heads, c.latent_dim, c.latent_dim);
  const ScratchBuffer values(static_cast<size_t>(tokens * c.heads * c.value_dim) * sizeof(float));
  std::vector<const uint8_t*> rows(static_cast<size_t>(tokens * c.heads));
  std::vector<LinearTask> tasks;
  for (int64_t h = 0; h < c.heads; ++h) {
    const uint8_t** head_rows = rows.data() + h * tokens;
    for (int64_t t = 0; t < tokens; ++t) head_rows[t] = quantized.row(t * c.heads + h);
    tasks.push_back(
        {weights_.v_b.get(), h, head_rows, tokens, values.floats() + h * c.value_dim, c.heads * c.value_dim});
  }
  run_linears(tasks);
  linear(*weights_.o, 0, values.floats(), tokens, out);
}

void MlaAttention::attend(const float* x, const float* rope_table, int64_t batch, int64_t tokens,
                          const LatentCache& cache, const Visibility& visibility, float* out) const {
  const AttentionConfig& c = config_;
  const int64_t total = batch * tokens;
  for (int64_t first = 0; first < total; first += kChunkTokens) {
    const int64_t count = std::min(kChunkTokens, total - first);
    const ScratchBuffer queries(static_cast<size_t>(count * c.heads * (c.latent_dim + c.rope_dim)) * sizeof(float));
    const ScratchBuffer attended(static_cast<size_t>(count * c.heads * c.latent_dim) * sizeof(float));
    absorbed_queries(x + first * c.hidden, rope_table + first * c.rope_dim, count, queries.floats());
    contexts(queries.floats(), first, count, tokens, cache, visibility, attended.floats());
    output(attended.floats(), count, out + first * c.hidden);
  }
}

void fill_rope_table(const int64_t* positions, int64_t tokens, const float* inv_freq, int64_t dim, float scaling,
                     float* table) {
  const int64_t half = dim / 2;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(static_cast<float>(positions[t]) * inv_freq[i]);
      table[t * dim + i] = static_cast<float>(std::cos(angle)) * scaling;
      table[t * dim + half + i] = static_cast<float>(std::sin(angle)) * scaling;
    }
  }
}

}  // namespace tkt
