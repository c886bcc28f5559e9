// A token's experts, chosen by one warp that keeps all scores in registers: lane l has experts
// [l * kPer, (l + 1) * kPer).
//
// Scores are compared as integers of the same order: one instruction finds the largest of a warp.
// Ties go to the lower id; NaN is worse than anything, so that a row that is broken still yields
// ids that exist.
#pragma once

#include <cmath>

#include "kernels/cuda/elements.cuh"
#include "kernels/ops.h"

namespace fathom::cuda {

inline constexpr int kMostRoutedExperts = 1024;
inline constexpr int kMostGroups = kWarp;
inline constexpr int kMostChoices = kWarp;  // of routed experts

struct Choice {
  RoutingConfig config;
  const float* bias;  // null without
  int num_experts;    // routed
  int* experts;       // [T, k]
  float* weights;     // [T, k]
};

// Greater for the better score; at least 1.
__device__ inline uint32_t SortKey(float score) {
  if (isnan(score)) return 1;
  const uint32_t bits = __float_as_uint(score + 0.0f);  // -0 becomes 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The best two of some experts' scores; NaN does not count.
struct BestTwo {
  float best = -INFINITY, second = -INFINITY;

  __device__ void Add(const BestTwo& other) {
    second = fmaxf(fminf(best, other.best), fmaxf(second, other.second));
    best = fmaxf(best, other.best);
  }
  // Of `lanes` neighbouring lanes, a power of two of them, in each of these.
  __device__ void AddNeighbours(int lanes) {
    for (int distance = 1; distance < lanes; distance *= 2) {
      BestTwo other;
      other.best = __shfl_xor_sync(kAllLanes, best, distance);
      other.second = __shfl_xor_sync(kAllLanes, second, distance);
      Add(other);
    }
  }
  __device__ float ScoreOfGroup(int size, TopkMethod method) const {
    return method == TopkMethod::kNoauxTc && size > 1 ? best + second : best;
  }
};
template <int kCount>
__device__ BestTwo BestTwoOf(const float* scores) {
  if constexpr (kCount == 1) {
    BestTwo one;
    one.best = fmaxf(scores[0], -INFINITY);
    return one;
  } else {
    BestTwo first = BestTwoOf<kCount / 2>(scores);
    first.Add(BestTwoOf<kCount / 2>(scores + kCount / 2));
    return first;
  }
}

// The largest of some keys, the first one if several are.
struct BestKey {
  uint32_t key;
  int place;
};
template <int kCount>
__device__ BestKey BestKeyOf(const uint32_t* keys, int first = 0) {
  if constexpr (kCount == 1) {
    return {keys[0], first};
  } else {
    const BestKey low = BestKeyOf<kCount / 2>(keys, first);
    const BestKey high = BestKeyOf<kCount / 2>(keys + kCount / 2, first + kCount / 2);
    return high.key > low.key ? high : low;
  }
}

// Sigmoid of each logit, or softmax over all. Logits of experts that do not exist are -inf.
template <int kPer>
__device__ void Score(const float (&logits)[kPer], ScoringFunc scoring_func,
                      float (&scores)[kPer]) {
  if (scoring_func == ScoringFunc::kSigmoid) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) scores[i] = 1.0f / (1.0f + expf(-logits[i]));
    return;
  }
  float largest = -INFINITY, sum = 0.0f;
#pragma unroll
  for (const float logit : logits) largest = fmaxf(largest, logit);
  largest = WarpMax(largest);
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    scores[i] = expf(logits[i] - largest);
    sum += scores[i];
  }
  sum = WarpSum(sum);
#pragma unroll
  for (float& score : scores) score /= sum;
}

// How many groups are better than this lane's, if each group's key is at its first lane, `sharing`
// lanes after the group before.
__device__ inline int BetterGroups(uint32_t key, int group, int num_groups, int sharing) {
  int better = 0;
#pragma unroll 4
  for (int g = 0; g < num_groups; ++g) {
    const uint32_t other = __shfl_sync(kAllLanes, key, g * sharing);
    better += other > key || (other == key && g < group);
  }
  return better;
}

// Bit g: whether group g is one of the topk_group best. `room`: shared memory of this warp's,
// num_experts floats.
template <int kPer>
__device__ uint32_t KeptGroups(const float (&choice)[kPer], const Choice& arguments, float* room) {
  const int lane = threadIdx.x % kWarp;
  const int groups = arguments.config.n_group, size = arguments.num_experts / groups;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (lane * kPer + i < arguments.num_experts) room[lane * kPer + i] = choice[i];
  }
  __syncwarp();
  // As many lanes as there are share a group, a power of two of them.
  int sharing = 1;
  while (sharing * 2 * groups <= kWarp && sharing * 2 <= size) sharing *= 2;
  const int group = lane / sharing, part = lane % sharing;
  BestTwo best;
  if (group < groups) {
    for (int i = part; i < size; i += sharing) best.Add(BestTwoOf<1>(&room[group * size + i]));
  }
  best.AddNeighbours(sharing);
  const uint32_t key =
      group < groups ? SortKey(best.ScoreOfGroup(size, arguments.config.topk_method)) : 0;
  const int better = BetterGroups(key, group, groups, sharing);
  const bool kept = group < groups && part == 0 && better < arguments.config.topk_group;
  const uint32_t lanes = __ballot_sync(kAllLanes, kept);
  uint32_t result = 0;
  for (int g = 0; g < groups; ++g) result |= (lanes >> (g * sharing) & 1) << g;
  __syncwarp();
  return result;
}

// Bit i: whether this lane's expert i is in one of the topk_group best groups.
template <int kPer>
__device__ uint32_t KeptExperts(const float (&choice)[kPer], const Choice& arguments, float* room) {
  const RoutingConfig& config = arguments.config;
  if (config.topk_method == TopkMethod::kGreedy || config.topk_group >= config.n_group) return ~0u;
  const int lane = threadIdx.x % kWarp, size = arguments.num_experts / config.n_group;
  const int sharing = size / kPer;
  if (size == sharing * kPer && (sharing & (sharing - 1)) == 0 &&
      config.n_group * sharing == kWarp) {
    // Whole lanes share a group: nothing need go through memory.
    BestTwo best = BestTwoOf<kPer>(choice);
    best.AddNeighbours(sharing);
    const uint32_t key = SortKey(best.ScoreOfGroup(size, config.topk_method));
    const int better = BetterGroups(key, lane / sharing, config.n_group, sharing);
    return better < config.topk_group ? ~0u : 0u;
  }
  const uint32_t groups = KeptGroups(choice, arguments, room);
  uint32_t experts = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (lane * kPer + i < arguments.num_experts) {
      experts |= (groups >> ((lane * kPer + i) / size) & 1) << i;
    }
  }
  return experts;
}

// All lanes of a warp. Logits of experts that do not exist are -inf. `room`: shared memory of this
// warp's, num_experts floats. Returns choice l of lane l, of the routed experts.
template <int kPer>
__device__ int ChooseExperts(const float (&logits)[kPer], const Choice& arguments, int64_t token,
                             float* room) {
  const RoutingConfig& config = arguments.config;
  const int lane = threadIdx.x % kWarp;
  float scores[kPer], choice[kPer];
  Score(logits, config.scoring_func, scores);
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int expert = lane * kPer + i;
    const bool biased =
        config.topk_method == TopkMethod::kNoauxTc && expert < arguments.num_experts;
    choice[i] = biased ? scores[i] + arguments.bias[expert] : scores[i];
  }
  const uint32_t kept = KeptExperts(choice, arguments, room);
  uint32_t keys[kPer];  // 0: taken, or no expert
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int expert = lane * kPer + i;
    keys[i] = SortKey(kept >> i & 1 ? choice[i] : -INFINITY);
    if (expert >= arguments.num_experts) {
      keys[i] = 0;
    } else {
      room[expert] = scores[i];
    }
  }

  int mine = 0;  // lane j keeps choice j
  for (int j = 0; j < config.num_experts_per_tok; ++j) {
    const BestKey best = BestKeyOf<kPer>(keys);
    const uint32_t best_of_all = __reduce_max_sync(kAllLanes, best.key);
    const int owner =
        __ffs(static_cast<int>(__ballot_sync(kAllLanes, best.key == best_of_all))) - 1;
    const int expert = __shfl_sync(kAllLanes, lane * kPer + best.place, owner);
    if (lane == j) mine = expert;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (lane * kPer + i == expert) keys[i] = 0;
    }
  }
  __syncwarp();
  const float share = lane < config.num_experts_per_tok ? room[mine] : 0.0f;
  const float sum = WarpSum(share);
  const int64_t first = token * config.num_choices();
  if (lane < config.num_experts_per_tok) {
    const float divisor = config.norm_topk_prob ? sum + 1e-20f : 1.0f;  // never 0 / 0
    arguments.experts[first + lane] = mine;
    arguments.weights[first + lane] = share / divisor * config.routed_scaling_factor;
  }
  for (int j = lane; j < config.num_shared_experts; j += kWarp) {
    const int64_t place = first + config.num_experts_per_tok + j;
    arguments.experts[place] = arguments.num_experts + j;
    arguments.weights[place] = 1.0f;
  }
  return mine;
}

}  // namespace fathom::cuda
