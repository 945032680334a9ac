#include "layers/router.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "kernels/dispatch.h"
#include "machine/thread_pool.h"

namespace tkt {
namespace {

// Indices of the n largest of `count` values, by repeated selection: n and count are small.
void select_largest(const float* values, int64_t count, int64_t n, int64_t* chosen) {
  for (int64_t k = 0; k < n; ++k) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; ++i) {
      if (best >= 0 && !(values[i] > values[best])) continue;
      if (std::find(chosen, chosen + k, i) == chosen + k) best = i;
    }
    chosen[k] = best;
  }
}

float group_score(GroupScore kind, const float* scores, int64_t count) {
  int64_t top[2];
  select_largest(scores, count, kind == GroupScore::kTop2Sum ? 2 : 1, top);
  return kind == GroupScore::kTop2Sum ? scores[top[0]] + scores[top[1]] : scores[top[0]];
}

void score(const KernelTable& table, Scoring scoring, const float* logits, int64_t experts, float* scores) {
  if (scoring == Scoring::kSigmoid) {
    std::vector<float> negated(static_cast<size_t>(experts));
    for (int64_t e = 0; e < experts; ++e) negated[static_cast<size_t>(e)] = -logits[e];
    table.exp_minus(negated.data(), 0.0f, experts, scores);
    for (int64_t e = 0; e < experts; ++e) scores[e] = 1.0f / (1.0f + scores[e]);
    return;
  }
  table.exp_minus(logits, *std::max_element(logits, logits + experts), experts, scores);
  float sum = 0.0f;
  for (int64_t e = 0; e < experts; ++e) sum += scores[e];
  for (int64_t e = 0; e < experts; ++e) scores[e] = scores[e] / sum;
}

void route_token(const RouterConfig& config, const std::vector<float>& bias, int64_t experts, const float* logits,
                 int32_t* indices, float* weights) {
  std::vector<float> scores(static_cast<size_t>(experts));
  score(kernels(), config.scoring, logits, experts, scores.data());
  std::vector<float> choice = scores;
  for (size_t e = 0; e < bias.size(); ++e) choice[e] += bias[e];

  if (config.groups > 1) {
    const int64_t size = experts / config.groups;
    std::vector<float> group_scores(static_cast<size_t>(config.groups));
    for (int64_t g = 0; g < config.groups; ++g) {
      group_scores[static_cast<size_t>(g)] = group_score(config.group_score, choice.data() + g * size, size);
    }
    std::vector<int64_t> kept(static_cast<size_t>(config.top_groups));
    select_largest(group_scores.data(), config.groups, config.top_groups, kept.data());
    for (int64_t g = 0; g < config.groups; ++g) {
      if (std::find(kept.begin(), kept.end(), g) != kept.end()) continue;
      std::fill_n(choice.begin() + g * size, size, -INFINITY);
    }
  }
  std::vector<int64_t> chosen(static_cast<size_t>(config.top_k));
  select_largest(choice.data(), experts, config.top_k, chosen.data());
  std::sort(chosen.begin(), chosen.end());
  float sum = 0.0f;
  for (const int64_t e : chosen) sum += scores[static_cast<size_t>(e)];
  for (int64_t k = 0; k < config.top_k; ++k) {
    float weight = scores[static_cast<size_t>(chosen[static_cast<size_t>(k)])];
    if (config.normalize) weight = weight / (sum + 1e-20f);
    indices[k] = static_cast<int32_t>(chosen[static_cast<size_t>(k)]);
    weights[k] = weight * config.scale;
  }
}

}  // namespace

void check_router(const RouterConfig& config, int64_t experts) {
  const bool groups_fit = config.groups >= 1 && config.groups <= experts && experts % config.groups == 0 &&
                          config.top_groups >= 1 && config.top_groups <= config.groups;
  const int64_t reachable = groups_fit ? experts / config.groups * config.top_groups : 0;
  const int64_t group_minimum = config.group_score == GroupScore::kTop2Sum && config.groups > 1 ? 2 : 1;
  if (groups_fit && experts / config.groups >= group_minimum && config.top_k >= 1 && config.top_k <= reachable) return;
  throw std::invalid_argument("router: " + std::to_string(config.top_k) + " of " + std::to_string(experts) +
                              " experts in " + std::to_string(config.top_groups) + " of " +
                              std::to_string(config.groups) + " groups is not possible");
}

void route(const RouterConfig& config, const std::vector<float>& bias, int64_t experts, const float* logits,
           int64_t tokens, int32_t* indices, float* weights) {
  parallel_for(tokens, [&](int64_t t) {
    route_token(config, bias, experts, logits + t * experts, indices + t * config.top_k, weights + t * config.top_k);
  });
}

}  // namespace tkt
