#include "layers/mla.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels/dispatch.h"
#include "layers/linear.h"
#include "machine/thread_pool.h"

namespace tkt {
namespace {

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
  throw std::invalid_argument(std::string(name) + " must be " + shape_text(count, rows, cols) + ", got " +
                              shape_text(w.get()));
}

// Also bounds them, so that no product of two overflows.
const AttentionConfig& checked(const AttentionConfig& c) {
  for (const auto& [name, size] : {std::pair("hidden", c.hidden), std::pair("heads", c.heads),
                                   std::pair("nope_dim", c.nope_dim), std::pair("rope_dim", c.rope_dim),
                                   std::pair("latent_dim", c.latent_dim), std::pair("value_dim", c.value_dim)}) {
    if (size >= 1 && size <= INT32_MAX) continue;
    throw std::invalid_argument(std::string(name) + " must be from 1 to " + std::to_string(INT32_MAX) + ", got " +
                                std::to_string(size));
  }
  if (c.rope_dim % 2 != 0) throw std::invalid_argument("rope_dim must be even, got " + std::to_string(c.rope_dim));
  return c;
}

void check_norm(const std::vector<float>& norm, const char* name, int64_t size) {
  if (static_cast<int64_t>(norm.size()) == size) return;
  throw std::invalid_argument(std::string(name) + " must have " + std::to_string(size) + " values, got " +
                              std::to_string(norm.size()));
}

// out[tokens][heads][out_width], of which w[head] computes the first rows from inputs[tokens][heads].
void run_heads(const PackedMatrix& w, const Activations& inputs, int64_t tokens, float* out, int64_t out_width) {
  const int64_t heads = w.count();
  std::vector<const uint8_t*> by_head(static_cast<size_t>(tokens * heads));
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t t = 0; t < tokens; ++t) by_head[static_cast<size_t>(h * tokens + t)] = inputs.row(t * heads + h);
  }
  run_linears({{&w, 0, heads, by_head.data(), tokens, out, out_width, heads * out_width}});
}

}  // namespace

MlaAttention::MlaAttention(const AttentionConfig& config, AttentionWeights weights)
    : Attention({config.hidden, config.rope_dim, {config.latent_dim, config.rope_dim}}),
      config_(checked(config)),
      weights_(std::move(weights)) {
  const AttentionConfig& c = config_;
  int64_t query_inputs = c.hidden;
  if (weights_.q_a != nullptr) {
    query_inputs = weights_.q_a->rows();
    check_shape(weights_.q_a, "q_a_proj", 1, query_inputs, c.hidden);
    check_norm(weights_.q_a_norm, "q_a_layernorm", query_inputs);
  }
  check_shape(weights_.q, "q_proj or q_b_proj", 1, c.heads * (c.nope_dim + c.rope_dim), query_inputs);
  check_shape(weights_.kv_a, "kv_a_proj_with_mqa", 1, c.latent_dim + c.rope_dim, c.hidden);
  check_shape(weights_.k_b, "k_b", c.heads, c.latent_dim, c.nope_dim);
  check_shape(weights_.v_b, "v_b", c.heads, c.value_dim, c.latent_dim);
  check_shape(weights_.o, "o_proj", 1, c.hidden, c.heads * c.value_dim);
  check_norm(weights_.kv_a_norm, "kv_a_layernorm", c.latent_dim);
}

std::vector<std::shared_ptr<PackedMatrix>> MlaAttention::matrices() const {
  const AttentionWeights& w = weights_;
  std::vector<std::shared_ptr<PackedMatrix>> all{w.q, w.kv_a, w.k_b, w.v_b, w.o};
  if (w.q_a != nullptr) all.push_back(w.q_a);
  return all;
}

void MlaAttention::project_keys(const LayerInput& in, const CacheRows* rows) const {
  const ScratchBuffer compressed(static_cast<size_t>(in.rows() * weights_.kv_a->rows()) * sizeof(float));
  linear(*weights_.kv_a, 0, in.x, in.rows(), compressed.floats());
  store_keys(compressed.floats(), in, rows);
}

void MlaAttention::store_keys(const float* compressed, const LayerInput& in, const CacheRows* rows) const {
  const AttentionConfig& c = config_;
  const KernelTable& table = kernels();
  parallel_for(in.rows(), [&](int64_t row) {
    const int64_t sequence = row / in.tokens;
    const int64_t t = row % in.tokens;
    const float* from = compressed + row * (c.latent_dim + c.rope_dim);
    table.rms_norm(from, weights_.kv_a_norm.data(), c.norm_eps, c.latent_dim, rows[sequence].first.row(t));
    rotate(in.rope_table + row * c.rope_dim, c.rope_dim, from + c.latent_dim, rows[sequence].second.row(t));
  });
}

void MlaAttention::absorb_queries(float* first, const float* rope_table, int64_t tokens, float* queries) const {
  const AttentionConfig& c = config_;
  const KernelTable& table = kernels();
  const int64_t head_dim = c.nope_dim + c.rope_dim;
  const int64_t width = c.latent_dim + c.rope_dim;
  const bool has_two = weights_.q_a != nullptr;
  const ScratchBuffer second(static_cast<size_t>(has_two ? tokens * c.heads * head_dim : 0) * sizeof(float));
  if (has_two) {
    const int64_t rank = weights_.q_a->rows();
    parallel_for(tokens, [&](int64_t t) {
      float* row = first + t * rank;
      table.rms_norm(row, weights_.q_a_norm.data(), c.norm_eps, rank, row);
    });
    linear(*weights_.q, 0, first, tokens, second.floats());
  }
  const float* plain = has_two ? second.floats() : first;
  const Activations nope(Activations::Deferred{}, weights_.k_b->info().activation, plain, tokens * c.heads, c.nope_dim,
                         head_dim);
  for_each_row(tokens * c.heads, head_dim, [&](int64_t row) {
    rotate(rope_table + row / c.heads * c.rope_dim, c.rope_dim, plain + row * head_dim + c.nope_dim,
           queries + row * width + c.latent_dim);
    nope.quantize_row(row);
  });
  run_heads(*weights_.k_b, nope, tokens, queries, width);
}

void MlaAttention::output(const float* contexts, int64_t tokens, float* out) const {
  const AttentionConfig& c = config_;
  const Activations quantized(weights_.v_b->info().activation, contexts, tokens * c.heads, c.latent_dim, c.latent_dim);
  const ScratchBuffer values(static_cast<size_t>(tokens * c.heads * c.value_dim) * sizeof(float));
  run_heads(*weights_.v_b, quantized, tokens, values.floats(), c.value_dim);
  linear(*weights_.o, 0, values.floats(), tokens, out);
}

void MlaAttention::attend_chunk(float* first, const float* rope_table, const TokenRange& tokens, const Cache* caches,
                                const Visibility& visibility, float* out) const {
  const AttentionConfig& c = config_;
  const ScratchBuffer queries(static_cast<size_t>(tokens.count * c.heads * (c.latent_dim + c.rope_dim)) *
                              sizeof(float));
  const ScratchBuffer attended(static_cast<size_t>(tokens.count * c.heads * c.latent_dim) * sizeof(float));
  absorb_queries(first, rope_table, tokens.count, queries.floats());
  attend_latents({c.heads, c.latent_dim, c.rope_dim, c.softmax_scale}, queries.floats(), tokens, caches, visibility,
                 attended.floats());
  output(attended.floats(), tokens.count, out);
}

void MlaAttention::attend(const LayerInput& in, const Cache* caches, const Visibility& visibility, float* out) const {
  const AttentionConfig& c = config_;
  const int64_t total = in.rows();
  const ScratchBuffer first_rows(static_cast<size_t>(std::min(kChunkTokens, total) * first_query().rows()) *
                                 sizeof(float));
  for (int64_t first = 0; first < total; first += kChunkTokens) {
    const int64_t count = std::min(kChunkTokens, total - first);
    linear(first_query(), 0, in.x + first * c.hidden, count, first_rows.floats());
    attend_chunk(first_rows.floats(), in.rope_table + first * c.rope_dim, {first, count, in.tokens}, caches, visibility,
                 out + first * c.hidden);
  }
}

void MlaAttention::append_and_attend(const LayerInput& in, const Cache* caches, const Visibility& visibility,
                                     float* out) const {
  const int64_t total = in.rows();
  std::vector<CacheRows> new_rows(static_cast<size_t>(in.batch));
  for (size_t s = 0; s < new_rows.size(); ++s) new_rows[s] = caches[s].last(in.tokens);
  const PackedMatrix& keys = *weights_.kv_a;
  const PackedMatrix& query = first_query();
  if (total > kChunkTokens || keys.info().activation != query.info().activation) {
    project_keys(in, new_rows.data());
    attend(in, caches, visibility, out);
    return;
  }
  const ScratchBuffer compressed(static_cast<size_t>(total * keys.rows()) * sizeof(float));
  const ScratchBuffer first(static_cast<size_t>(total * query.rows()) * sizeof(float));
  const Activations rows(keys.info().activation, in.x, total, keys.cols(), keys.cols());
  run_linears({{&keys, 0, 1, rows.rows(), total, compressed.floats(), 0, keys.rows()},
               {&query, 0, 1, rows.rows(), total, first.floats(), 0, query.rows()}});
  store_keys(compressed.floats(), in, new_rows.data());
  attend_chunk(first.floats(), in.rope_table, {0, total, in.tokens}, caches, visibility, out);
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
