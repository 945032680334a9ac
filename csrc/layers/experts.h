// The feed-forward half of a decoder layer: routed experts, shared experts; also the dense MLP.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "layers/packed_matrix.h"
#include "layers/router.h"

namespace tkt {

// y = down(silu(gate x) * (up x)) for each of `count` experts; a dense MLP or the shared experts are one expert.
// The three may have different types.
class ExpertWeights {
 public:
  // Throws std::invalid_argument where the shapes do not belong together: gate and up are intermediate x hidden, down
  // is hidden x intermediate, counts are equal.
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

// out[tokens][hidden] = sum over a token's experts, ascending, of weight * expert(x), then + shared(x) where that is
// not null.
void run_experts(const ExpertWeights& routed, const Routing& routing, const ExpertWeights* shared, const float* x,
                 int64_t tokens, float* out);

// out[tokens][hidden] = the only expert of `mlp` for each token.
void run_mlp(const ExpertWeights& mlp, const float* x, int64_t tokens, float* out);

class MoeBlock {
 public:
  // Throws std::invalid_argument where shapes or the router's numbers contradict each other.
  MoeBlock(std::shared_ptr<PackedMatrix> router, std::vector<float> bias, const RouterConfig& config,
           std::shared_ptr<ExpertWeights> routed, std::shared_ptr<ExpertWeights> shared);

  std::vector<std::shared_ptr<PackedMatrix>> matrices() const;
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
