// Multi-head latent attention (MLA, arXiv:2405.04434, section 2.1) with the key projection absorbed into the query: the
// cache holds one latent and one rotary key per token and layer, and all heads attend over it directly.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "layers/attention.h"
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

// A cache of latents (latent_dim values, normed) and rotary keys (rope_dim values, rotated).
class MlaAttention : public Attention {
 public:
  // Throws std::invalid_argument where a size is not positive or the shapes contradict the config.
  MlaAttention(const AttentionConfig& config, AttentionWeights weights);

  std::vector<std::shared_ptr<PackedMatrix>> matrices() const override;
  void project_keys(const LayerInput& in, const CacheRows* rows) const override;
  void attend(const LayerInput& in, const Cache* caches, const Visibility& visibility, float* out) const override;
  // Few tokens are projected to keys and queries in one loop.
  void append_and_attend(const LayerInput& in, const Cache* caches, const Visibility& visibility,
                         float* out) const override;

 private:
  // What queries are projected with first.
  const PackedMatrix& first_query() const { return weights_.q_a != nullptr ? *weights_.q_a : *weights_.q; }
  // The rest of their way, and that of keys, in place of `first` and from `compressed`.
  void absorb_queries(float* first, const float* rope_table, int64_t tokens, float* queries) const;
  void store_keys(const float* compressed, const LayerInput& in, const CacheRows* rows) const;
  void attend_chunk(float* first, const float* rope_table, const TokenRange& tokens, const Cache* caches,
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
