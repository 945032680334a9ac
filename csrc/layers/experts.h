// The feed-forward half of a decoder layer: router, routed experts, shared experts; also the dense MLP.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "layers/packed_matrix.h"

namespace tkt {

// y = down(silu(gate x) * (up x)) for each of `count` experts; a dense MLP or the shared experts are one expert.
// The three may have different types.
class ExpertWeights {
 public:
  // Throws std::invalid_argument where the shapes do not belong together: gate and up are intermediate x hidden, down is
  // hidden x intermediate, counts are equal.
  ExpertWeights(std::shared_ptr<PackedMatrix> gate, std::shared_ptr<PackedMatrix> up,
                std::shared_ptr<PackedMatrix> down);

  const PackedMatrix& gate() const { return *gate_; }
  const PackedMatrix& up() const { return *up_; }
  const PackedMatrix& down() const { return *down_; }
  std::vector<std::shared_ptr<PackedMatrix>> matrices() const { return {gate_, up_, down_}; }
  int64_t count() const { return gate_->count(); }
  int64_t hidden() const { return gate_->cols(); }
  int64_t intermediate() const { return gate_->rows(); }

 private:
  std::shared_ptr<PackedMatrix> gate_;
  std::shared_ptr<PackedMatrix> up_;
  std::shared_ptr<PackedMatrix> down_;
};

enum class Scoring { kSoftmax, kSigmoid };
enum class GroupScore { kMax, kTop2Sum };  // DeepSeek-V2; DeepSeek-V3

// Top-k routing of DeepSeek-V2 (softmax) and DeepSeek-V3 (sigmoid, arXiv:2412.19437, eq. 12-16).
struct RouterConfig {
  Scoring scoring;
  GroupScore group_score;
  int64_t groups;  // 1: no group limit
  int64_t top_groups;
  int64_t top_k;
  bool normalize;  // weights of the chosen experts sum to 1 before `scale`
  float scale;
};

// Chooses top_k of scores.size() experts for each token from logits[tokens][experts]. Ties go to the lower index. The
// bias takes part in the choice, not in the weights. Writes indices[tokens][top_k] ascending, and weights likewise.
void route(const RouterConfig& config, const std::vector<float>& bias, int64_t experts, const float* logits,
           int64_t tokens, int32_t* indices, float* weights);

// out[tokens][hidden] = sum over a token's experts, ascending, of weight * expert(x), then + shared(x). Each of routed
// and shared may be null; indices are int32 in [0, routed->count()), each at most once per token.
void run_experts(const ExpertWeights* routed, const int32_t* indices, const float* weights, int64_t top_k,
                 const ExpertWeights* shared, const float* x, int64_t tokens, float* out);

class MoeBlock {
 public:
  // Throws std::invalid_argument where shapes or the router's numbers contradict each other.
  MoeBlock(std::shared_ptr<PackedMatrix> router, std::vector<float> bias, const RouterConfig& config,
           std::shared_ptr<ExpertWeights> routed, std::shared_ptr<ExpertWeights> shared);

  int64_t hidden() const { return routed_->hidden(); }
  int64_t experts() const { return routed_->count(); }
  const std::shared_ptr<ExpertWeights>& routed() const { return routed_; }

  // x, out: [tokens][hidden]. logits receives the router's output, [tokens][experts].
  void forward(const float* x, int64_t tokens, float* out, float* logits) const;

 private:
  std::shared_ptr<PackedMatrix> router_;
  std::vector<float> bias_;
  RouterConfig config_;
  std::shared_ptr<ExpertWeights> routed_;
  std::shared_ptr<ExpertWeights> shared_;
};

}  // namespace tkt
