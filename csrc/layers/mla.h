// Multi-head latent attention (MLA, arXiv:2405.04434, section 2.1) with the key projection absorbed into the query: the
// cache holds one latent and one rotary key per token and layer, and all heads attend over it directly.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "layers/latent_softmax.h"
#include "layers/packed_matrix.h"

namespace tkt {

struct AttentionConfig {
  int64_t hidden;
  int64_t heads;
  int64_t nope_dim;    // qk_nope_head_dim
  int64_t rope_dim;    // qk_rope_head_dim
  int64_t latent_dim;  // kv_lora_rank
  int64_t value_dim;   // v_head_dim
  float softmax_scale;
  float norm_eps;  // of q_a_layernorm and kv_a_layernorm
};

struct AttentionWeights {
  std::shared_ptr<PackedMatrix> q_a;   // q_lora x hidden; null where queries are not compressed
  std::vector<float> q_a_norm;         // q_lora
  std::shared_ptr<PackedMatrix> q;     // heads * (nope + rope) x (q_lora or hidden)
  std::shared_ptr<PackedMatrix> kv_a;  // latent + rope x hidden
  std::vector<float> kv_a_norm;        // latent
  std::shared_ptr<PackedMatrix> k_b;   // per head: latent x nope
  std::shared_ptr<PackedMatrix> v_b;   // per head: value x latent
  std::shared_ptr<PackedMatrix> o;     // hidden x heads * value
};

// Where new keys go: as in a LatentCache, key i of sequence s being that of its token i.
struct KeyRows {
  float* latents;
  int64_t latent_batch_stride;
  int64_t latent_stride;
  float* ropes;
  int64_t rope_batch_stride;
  int64_t rope_stride;
};

class MlaAttention {
 public:
  // Throws std::invalid_argument where the shapes contradict the config.
  MlaAttention(const AttentionConfig& config, AttentionWeights weights);

  const AttentionConfig& config() const { return config_; }

  // What goes into the cache for x[batch][tokens][hidden] at rope_table[batch][tokens][rope_dim]: latents of latent_dim
  // values, normed, and keys of rope_dim, rotated.
  void project_keys(const float* x, const float* rope_table, int64_t batch, int64_t tokens, const KeyRows& keys) const;

  // out[batch][tokens][hidden] = attention of x[batch][tokens][hidden] over the cache. A query that sees no key gives
  // the output projection of zero.
  void attend(const float* x, const float* rope_table, int64_t batch, int64_t tokens, const LatentCache& cache,
              const Visibility& visibility, float* out) const;

  // Both, with new_keys the last rows of the cache. Few tokens are projected to keys and queries in one loop.
  void append_and_attend(const float* x, const float* rope_table, int64_t batch, int64_t tokens,
                         const KeyRows& new_keys, const LatentCache& cache, const Visibility& visibility,
                         float* out) const;

 private:
  // What queries are projected with first.
  const PackedMatrix& first_query() const { return weights_.q_a != nullptr ? *weights_.q_a : *weights_.q; }
  // The rest of their way, and that of keys, in place of `first` and from `compressed`.
  void absorb_queries(float* first, const float* rope_table, int64_t tokens, float* queries) const;
  void store_keys(const float* compressed, const float* rope_table, int64_t batch, int64_t tokens,
                  const KeyRows& keys) const;
  void attend_chunk(float* first, const float* rope_table, const TokenRange& tokens, const LatentCache& cache,
                    const Visibility& visibility, float* out) const;
  void output(const float* contexts, int64_t tokens, float* out) const;

  AttentionConfig config_;
  AttentionWeights weights_;
};

// table[tokens][dim] = cos of dim / 2 angles, then sin: angle = float(position) * inv_freq, in float as transformers
// computes it; cos and sin in double, rounded once, times `scaling`.
void fill_rope_table(const int64_t* positions, int64_t tokens, const float* inv_freq, int64_t dim, float scaling,
                     float* table);

}  // namespace tkt
