// Whole decoder layers in one call.
#pragma once

#include <cstdint>
#include <memory>

#include "layers/attention.h"
#include "layers/experts.h"

namespace tkt {

// Weights of a layer's norms, [hidden] each: given with each call, for whoever owns the model may change them.
struct LayerNorms {
  const float* input;
  const float* post_attention;
};

// h = x + attention(norm(x)); out = h + feed_forward(norm(h)), the same operations in the same order as its parts
// called one by one: what is saved is the way to and from Python between them.
class DecoderLayer {
 public:
  // Either `moe` or `mlp` (one expert) is the feed-forward half, the other null. Throws std::invalid_argument where the
  // parts do not belong together.
  DecoderLayer(std::shared_ptr<Attention> attention, std::shared_ptr<MoeBlock> moe, std::shared_ptr<ExpertWeights> mlp,
               float input_norm_eps, float post_norm_eps);

  const AttentionShape& shape() const { return attention_->shape(); }

  // Attention::project_keys of norm(x).
  void project_keys(const LayerInput& in, const float* input_norm, const CacheRows* rows) const;

  // out: [batch][tokens][hidden], which may be in.x; the rest as for Attention::attend.
  void forward(const LayerInput& in, const LayerNorms& norms, const Cache* caches, const Visibility& visibility,
               float* out) const;

  // The same, after writing the keys of x to the last in.tokens rows of each cache.
  void append_and_forward(const LayerInput& in, const LayerNorms& norms, const Cache* caches,
                          const Visibility& visibility, float* out) const;

 private:
  void run(const LayerInput& in, const LayerNorms& norms, bool appends, const Cache* caches,
           const Visibility& visibility, float* out) const;
  void feed_forward(const float* x, int64_t tokens, float* out) const;

  std::shared_ptr<Attention> attention_;
  std::shared_ptr<MoeBlock> moe_;
  std::shared_ptr<ExpertWeights> mlp_;
  float input_norm_eps_;
  float post_norm_eps_;
};

}  // namespace tkt
