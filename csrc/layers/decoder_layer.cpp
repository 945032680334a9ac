#include "layers/decoder_layer.h"

#include <stdexcept>
#include <utility>

#include "kernels/dispatch.h"
#include "machine/memory.h"
#include "machine/thread_pool.h"

namespace tkt {
namespace {

// values += residual, on all threads.
void add_rows(const float* residual, int64_t tokens, int64_t hidden, float* values) {
  parallel_for(tokens, [&](int64_t t) {
    for (int64_t i = t * hidden; i < (t + 1) * hidden; ++i) values[i] += residual[i];
  });
}

}  // namespace

DecoderLayer::DecoderLayer(std::shared_ptr<MlaAttention> attention, std::shared_ptr<MoeBlock> moe,
                           std::shared_ptr<ExpertWeights> mlp, float input_norm_eps, float post_norm_eps)
    : attention_(std::move(attention)),
      moe_(std::move(moe)),
      mlp_(std::move(mlp)),
      input_norm_eps_(input_norm_eps),
      post_norm_eps_(post_norm_eps) {
  if (attention_ == nullptr || (moe_ == nullptr) == (mlp_ == nullptr)) {
    throw std::invalid_argument("a decoder layer has an attention and either a MoE block or an MLP");
  }
  const int64_t hidden = moe_ != nullptr ? moe_->hidden() : mlp_->hidden();
  if (hidden != config().hidden || (mlp_ != nullptr && mlp_->count() != 1)) {
    throw std::invalid_argument("attention and feed-forward half do not belong together");
  }
}

void DecoderLayer::norm(const float* x, const float* weight, float eps, int64_t tokens, float* out) const {
  const KernelTable& table = kernels();
  const int64_t hidden = config().hidden;
  parallel_for(tokens, [&](int64_t t) { table.rms_norm(x + t * hidden, weight, eps, hidden, out + t * hidden); });
}

void DecoderLayer::feed_forward(const float* x, int64_t tokens, float* out) const {
  if (mlp_ != nullptr) {
    run_experts(nullptr, nullptr, nullptr, 0, mlp_.get(), x, tokens, out);
    return;
  }
  const ScratchBuffer logits(static_cast<size_t>(tokens * moe_->experts()) * sizeof(float));
  moe_->forward(x, tokens, out, logits.floats());
}

void DecoderLayer::project_keys(const float* x, const float* input_norm, const float* rope_table, int64_t batch,
                                int64_t tokens, const KeyRows& keys) const {
  const ScratchBuffer normed(static_cast<size_t>(batch * tokens * config().hidden) * sizeof(float));
  norm(x, input_norm, input_norm_eps_, batch * tokens, normed.floats());
  attention_->project_keys(normed.floats(), rope_table, batch, tokens, keys);
}

void DecoderLayer::attend_and_feed_forward(const float* x, const float* input_norm, const float* post_norm,
                                           const float* rope_table, int64_t batch, int64_t tokens,
                                           const KeyRows* new_keys, const LatentCache& cache,
                                           const Visibility& visibility, float* out) const {
  const int64_t rows = batch * tokens;
  const int64_t hidden = config().hidden;
  const ScratchBuffer normed(static_cast<size_t>(rows * hidden) * sizeof(float));
  const ScratchBuffer middle(static_cast<size_t>(rows * hidden) * sizeof(float));
  norm(x, input_norm, input_norm_eps_, rows, normed.floats());
  if (new_keys != nullptr) {
    attention_->append_and_attend(normed.floats(), rope_table, batch, tokens, *new_keys, cache, visibility,
                                  middle.floats());
  } else {
    attention_->attend(normed.floats(), rope_table, batch, tokens, cache, visibility, middle.floats());
  }
  add_rows(x, rows, hidden, middle.floats());
  norm(middle.floats(), post_norm, post_norm_eps_, rows, normed.floats());
  feed_forward(normed.floats(), rows, out);
  add_rows(middle.floats(), rows, hidden, out);
}

void DecoderLayer::forward(const float* x, const float* input_norm, const float* post_norm, const float* rope_table,
                           int64_t batch, int64_t tokens, const LatentCache& cache, const Visibility& visibility,
                           float* out) const {
  attend_and_feed_forward(x, input_norm, post_norm, rope_table, batch, tokens, nullptr, cache, visibility, out);
}

void DecoderLayer::append_and_forward(const float* x, const float* input_norm, const float* post_norm,
                                      const float* rope_table, int64_t batch, int64_t tokens, const KeyRows& new_keys,
                                      const LatentCache& cache, const Visibility& visibility, float* out) const {
  attend_and_feed_forward(x, input_norm, post_norm, rope_table, batch, tokens, &new_keys, cache, visibility, out);
}

}  // namespace tkt
