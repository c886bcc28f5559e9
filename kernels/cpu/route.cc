#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/shape_checks.h"

namespace fathom {
namespace {

constexpr float kDropped = -std::numeric_limits<float>::infinity();

// Scores of one token: sigmoid of each logit, or softmax over all.
void Score(const float* logits, ScoringFunc scoring_func, std::vector<float>& scores) {
  const size_t count = scores.size();
  if (scoring_func == ScoringFunc::kSigmoid) {
    for (size_t e = 0; e < count; ++e) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    return;
  }
  const float largest = *std::max_element(logits, logits + count);
  float sum = 0.0f;
  for (size_t e = 0; e < count; ++e) {
    scores[e] = std::exp(logits[e] - largest);
    sum += scores[e];
  }
  for (size_t e = 0; e < count; ++e) scores[e] /= sum;
}

// The index of the largest element that is not taken, ties to the lower one. NaN comes last, so
// that a row that is broken still yields ids that exist; its weights stay NaN and tell.
size_t LargestOf(const float* values, size_t count, const std::vector<bool>& taken) {
  size_t best = count;
  for (size_t i = 0; i < count; ++i) {
    if (taken[i]) continue;
    if (best == count || values[i] > values[best] ||
        (std::isnan(values[best]) && !std::isnan(values[i]))) {
      best = i;
    }
  }
  return best;
}

// What a group counts: its best member, or the sum of its two best ones.
float ScoreOfGroup(const float* choice, size_t size, TopkMethod method) {
  float best = kDropped;
  float second = kDropped;
  for (size_t i = 0; i < size; ++i) {
    if (choice[i] > best) {
      second = best;
      best = choice[i];
    } else if (choice[i] > second) {
      second = choice[i];
    }
  }
  return method == TopkMethod::kNoauxTc && size > 1 ? best + second : best;
}

// Sets the choice of every expert outside the topk_group best groups to -inf.
void DropGroups(const RoutingConfig& config, std::vector<float>& choice) {
  const auto num_groups = static_cast<size_t>(config.n_group);
  const size_t group_size = choice.size() / num_groups;
  std::vector<float> group_scores(num_groups);
  for (size_t g = 0; g < num_groups; ++g) {
    group_scores[g] = ScoreOfGroup(&choice[g * group_size], group_size, config.topk_method);
  }
  std::vector<bool> kept(num_groups, false);
  for (int i = 0; i < config.topk_group; ++i) {
    kept[LargestOf(group_scores.data(), num_groups, kept)] = true;
  }
  for (size_t e = 0; e < choice.size(); ++e) {
    if (!kept[e / group_size]) choice[e] = kDropped;
  }
}

// The routed choices of one token, best first, then the shared experts.
void Choose(const float* logits, const float* bias, const RoutingConfig& config,
            std::vector<float>& scores, int32_t* ids, float* shares) {
  const size_t num_experts = scores.size();
  Score(logits, config.scoring_func, scores);
  std::vector<float> choice = scores;
  if (config.topk_method == TopkMethod::kNoauxTc) {
    for (size_t e = 0; e < num_experts; ++e) choice[e] += bias[e];
  }
  if (config.topk_method != TopkMethod::kGreedy && config.topk_group < config.n_group) {
    DropGroups(config, choice);
  }

  std::vector<bool> taken(num_experts, false);
  float sum = 0.0f;
  for (int j = 0; j < config.num_experts_per_tok; ++j) {
    const size_t best = LargestOf(choice.data(), num_experts, taken);
    taken[best] = true;
    ids[j] = static_cast<int32_t>(best);
    shares[j] = scores[best];
    sum += scores[best];
  }
  const float divisor = config.norm_topk_prob ? sum + 1e-20f : 1.0f;  // never 0 / 0
  for (int j = 0; j < config.num_experts_per_tok; ++j) {
    shares[j] = shares[j] / divisor * config.routed_scaling_factor;
  }
  for (int j = 0; j < config.num_shared_experts; ++j) {
    ids[config.num_experts_per_tok + j] = static_cast<int32_t>(num_experts) + j;
    shares[config.num_experts_per_tok + j] = 1.0f;
  }
}

}  // namespace

void CpuOps::Route(const Tensor& x, const Tensor& gate, const Tensor& bias,
                   const RoutingConfig& config, int first_expert, const Routes& routes) {
  CheckRoute(x, gate, bias, config, routes);
  const Tensor& logits = routes.logits;
  Linear(x, {.values = gate}, logits);
  threads_.ParallelFor(
      logits.dim(0), SmallestRange(logits.dim(1) * 8), [&](int, int64_t begin, int64_t end) {
        std::vector<float> scores(static_cast<size_t>(logits.dim(1)));
        for (int64_t t = begin; t < end; ++t) {
          Choose(RowOf<float>(logits, t), bias.present() ? bias.data<float>() : nullptr, config,
                 scores, RowOf<int32_t>(routes.experts, t), RowOf<float>(routes.weights, t));
        }
      });
  GroupByExpert(routes.experts, first_expert, routes.groups);
}

}  // namespace fathom
