// Which experts a token goes to.
#pragma once

#include <cstdint>
#include <vector>

namespace tkt {

// Stands for an expert that is computed elsewhere: it costs nothing and adds nothing.
constexpr int32_t kNoExpert = -1;

// The choice for a number of tokens.
struct Routing {
  const int32_t* indices;  // [tokens][top_k], below the number of experts and at most once per token, or kNoExpert
  const float* weights;    // [tokens][top_k]
  int64_t top_k;

  Routing from(int64_t token) const { return {indices + token * top_k, weights + token * top_k, top_k}; }
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

// Throws std::invalid_argument where that cannot be chosen among so many experts.
void check_router(const RouterConfig& config, int64_t experts);

}  // namespace tkt
