#include "layers/decoder_layer.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "layers/row_ops.h"
#include "machine/memory.h"

namespace tkt {

DecoderLayer::DecoderLayer(std::shared_ptr<Attention> attention, std::shared_ptr<MoeBlock> moe,
                           std::shared_ptr<ExpertWeights> mlp, float input_norm_eps, float post_norm_eps)
    : attention_(std::move(attention)),
      moe_(std::move(moe)),
      mlp_(std::move(mlp)),
      input_norm_eps_(input_norm_eps),
      post_norm_eps_(post_norm_eps) {
  if (attention_ == nullptr || (moe_ == nullptr) == (mlp_ == nullptr)) {
    throw std::invalid_argument("a decoder layer has an attention and either a MoE block or an MLP");
  }
  if (mlp_ != nullptr && mlp_->count() != 1) {
    throw std::invalid_argument("an MLP is one expert, got " + std::to_string(mlp_->count()));
  }
  const int64_t hidden = moe_ != nullptr ? moe_->hidden() : mlp_->hidden();
  if (hidden != shape().hidden) {
    throw std::invalid_argument("the attention has hidden size " + std::to_string(shape().hidden) +
                                ", the feed-forward half " + std::to_string(hidden));
  }
}

void DecoderLayer::feed_forward(const float* x, int64_t tokens, float* out) const {
  if (mlp_ != nullptr) return run_mlp(*mlp_, x, tokens, out);
  const ScratchBuffer logits(static_cast<size_t>(tokens * moe_->experts()) * sizeof(float));
  moe_->forward(x, tokens, out, logits.floats());
}

void DecoderLayer::project_keys(const LayerInput& in, const float* input_norm, const CacheRows* rows) const {
  const int64_t hidden = shape().hidden;
  const ScratchBuffer normed(static_cast<size_t>(in.rows() * hidden) * sizeof(float));
  rms_norm_rows(in.x, input_norm, input_norm_eps_, in.rows(), hidden, normed.floats());
  attention_->project_keys({normed.floats(), in.rope_table, in.batch, in.tokens}, rows);
}

void DecoderLayer::run(const LayerInput& in, const LayerNorms& norms, bool appends, const Cache* caches,
                       const Visibility& visibility, float* out) const {
  const int64_t rows = in.rows();
  const int64_t hidden = shape().hidden;
  const ScratchBuffer normed(static_cast<size_t>(rows * hidden) * sizeof(float));
  const ScratchBuffer middle(static_cast<size_t>(rows * hidden) * sizeof(float));
  rms_norm_rows(in.x, norms.input, input_norm_eps_, rows, hidden, normed.floats());
  const LayerInput normed_in{normed.floats(), in.rope_table, in.batch, in.tokens};
  if (appends) {
    attention_->append_and_attend(normed_in, caches, visibility, middle.floats());
  } else {
    attention_->attend(normed_in, caches, visibility, middle.floats());
  }
  add_rows(in.x, rows, hidden, middle.floats());
  rms_norm_rows(middle.floats(), norms.post_attention, post_norm_eps_, rows, hidden, normed.floats());
  feed_forward(normed.floats(), rows, out);
  add_rows(middle.floats(), rows, hidden, out);
}

void DecoderLayer::forward(const LayerInput& in, const LayerNorms& norms, const Cache* caches,
                           const Visibility& visibility, float* out) const {
  run(in, norms, false, caches, visibility, out);
}

void DecoderLayer::append_and_forward(const LayerInput& in, const LayerNorms& norms, const Cache* caches,
                                      const Visibility& visibility, float* out) const {
  run(in, norms, true, caches, visibility, out);
}

}  // namespace tkt
