// Whole decoder layers in one call.
#pragma once

#include <cstdint>
#include <memory>

#include "layers/experts.h"
#include "layers/mla.h"

namespace tkt {

// h = x + attention(norm(x)); out = h + feed_forward(norm(h)), the same operations in the same order as its parts called
// one by one: what is saved is the way to and from Python between them.
class DecoderLayer {
 public:
  // Either `moe` or `mlp` (one expert) is the feed-forward half, the other null. Throws std::invalid_argument where the
  // parts do not belong together.
  DecoderLayer(std::shared_ptr<MlaAttention> attention, std::shared_ptr<MoeBlock> moe,
               std::shared_ptr<ExpertWeights> mlp, float input_norm_eps, float post_norm_eps);

  const AttentionConfig& config() const { return attention_->config(); }

  // MlaAttention::project_keys of norm(x), with input_norm[hidden].
  void project_keys(const float* x, const float* input_norm, const float* rope_table, int64_t batch, int64_t tokens,
                    const KeyRows& keys) const;

  // x, out: [batch][tokens][hidden], which may be the same; the rest as for MlaAttention::attend.
  void forward(const float* x, const float* input_norm, const float* post_norm, const float* rope_table, int64_t batch,
               int64_t tokens, const LatentCache& cache, const Visibility& visibility, float* out) const;

  // The same, after writing the keys of x to `new_keys`, which are then part of the cache.
  void append_and_forward(const float* x, const float* input_norm, const float* post_norm, const float* rope_table,
                          int64_t batch, int64_t tokens, const KeyRows& new_keys, const LatentCache& cache,
                          const Visibility& visibility, float* out) const;

 private:
  // Writes the keys of x first where there is a place for them.
  void attend_and_feed_forward(const float* x, const float* input_norm, const float* post_norm, const float* rope_table,
                               int64_t batch, int64_t tokens, const KeyRows* new_keys, const LatentCache& cache,
                               const Visibility& visibility, float* out) const;
  void norm(const float* x, const float* weight, float eps, int64_t tokens, float* out) const;
  void feed_forward(const float* x, int64_t tokens, float* out) const;

  std::shared_ptr<MlaAttention> attention_;
  std::shared_ptr<MoeBlock> moe_;
  std::shared_ptr<ExpertWeights> mlp_;
  float input_norm_eps_;
  float post_norm_eps_;
};

}  // namespace tkt
