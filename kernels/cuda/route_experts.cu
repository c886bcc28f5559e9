#include <cmath>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/shape_checks.h"

namespace fathom {
namespace cuda {
namespace {

// A set of small numbers in shared memory; number i stands in word i / 32.
__device__ bool Contains(const unsigned* set, int i) { return set[i / kWarp] >> i % kWarp & 1; }

struct Candidate {
  float value;
  int index;  // -1: none
};

// Larger is better, then the lower index; NaN is worse than anything, so that a row that is broken
// still yields ids that exist.
__device__ bool IsBetter(const Candidate& a, const Candidate& b) {
  if (a.index < 0 || b.index < 0) return a.index >= 0;
  if (isnan(a.value) != isnan(b.value)) return isnan(b.value);
  if (a.value == b.value || isnan(a.value)) return a.index < b.index;
  return a.value > b.value;
}

// The index of the best of values[0, count) that is not in `taken`; the warp puts it in.
__device__ int TakeBest(const float* values, int count, unsigned* taken) {
  Candidate best = {0.0f, -1};
  for (int i = threadIdx.x; i < count; i += kWarp) {
    const Candidate candidate = {values[i], i};
    if (!Contains(taken, i) && IsBetter(candidate, best)) best = candidate;
  }
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const Candidate other = {__shfl_xor_sync(kAllLanes, best.value, lanes),
                             __shfl_xor_sync(kAllLanes, best.index, lanes)};
    if (IsBetter(other, best)) best = other;
  }
  __syncwarp();
  if (threadIdx.x == 0) taken[best.index / kWarp] |= 1u << best.index % kWarp;
  __syncwarp();
  return best.index;
}

// What a group counts: its best member, or the sum of its two best ones.
__device__ float ScoreOfGroup(const float* choice, int size, TopkMethod method) {
  float best = -INFINITY;
  float second = -INFINITY;
  for (int i = 0; i < size; ++i) {
    if (choice[i] > best) {
      second = best;
      best = choice[i];
    } else if (choice[i] > second) {
      second = choice[i];
    }
  }
  return method == TopkMethod::kNoauxTc && size > 1 ? best + second : best;
}

__device__ void Score(const float* logits, ScoringFunc scoring_func, float* scores, int count) {
  if (scoring_func == ScoringFunc::kSigmoid) {
    for (int e = threadIdx.x; e < count; e += kWarp) scores[e] = 1.0f / (1.0f + expf(-logits[e]));
    return;
  }
  float largest = -INFINITY;
  for (int e = threadIdx.x; e < count; e += kWarp) largest = fmaxf(largest, logits[e]);
  largest = WarpMax(largest);
  float sum = 0.0f;
  for (int e = threadIdx.x; e < count; e += kWarp) {
    scores[e] = expf(logits[e] - largest);
    sum += scores[e];
  }
  sum = WarpSum(sum);
  for (int e = threadIdx.x; e < count; e += kWarp) scores[e] /= sum;
}

int WordsOf(int count) { return (count + kWarp - 1) / kWarp; }

// One warp for each token. Shared memory: scores, choice, taken; group scores, groups kept.
__global__ void RouteKernel(Rows<const float> logits, int num_experts, const float* bias,
                            RoutingConfig config, int* experts, float* weights) {
  extern __shared__ float shared[];
  float* scores = shared;
  float* choice = scores + num_experts;
  float* group_scores = choice + num_experts;
  auto* taken = reinterpret_cast<unsigned*>(group_scores + config.n_group);
  unsigned* kept = taken + (num_experts + kWarp - 1) / kWarp;
  const int lane = threadIdx.x;
  const int64_t token = blockIdx.x;

  Score(logits[token], config.scoring_func, scores, num_experts);
  for (int e = lane; e < num_experts; e += kWarp) {
    choice[e] = config.topk_method == TopkMethod::kNoauxTc ? scores[e] + bias[e] : scores[e];
    taken[e / kWarp] = 0;
  }
  for (int g = lane; g < config.n_group; g += kWarp) kept[g / kWarp] = 0;
  __syncwarp();

  if (config.topk_method != TopkMethod::kGreedy && config.topk_group < config.n_group) {
    const int size = num_experts / config.n_group;
    for (int g = lane; g < config.n_group; g += kWarp) {
      group_scores[g] = ScoreOfGroup(choice + g * size, size, config.topk_method);
    }
    __syncwarp();
    for (int i = 0; i < config.topk_group; ++i) TakeBest(group_scores, config.n_group, kept);
    for (int e = lane; e < num_experts; e += kWarp) {
      if (!Contains(kept, e / size)) choice[e] = -INFINITY;
    }
    __syncwarp();
  }

  const int choices = config.num_experts_per_tok;
  float sum = 0.0f;
  for (int j = 0; j < choices; ++j) {
    const int best = TakeBest(choice, num_experts, taken);
    sum += scores[best];
    if (lane == 0) experts[token * choices + j] = best;
  }
  __syncwarp();
  const float divisor = config.norm_topk_prob ? sum + 1e-20f : 1.0f;  // never 0 / 0
  for (int j = lane; j < choices; j += kWarp) {
    const float share = scores[experts[token * choices + j]];
    weights[token * choices + j] = share / divisor * config.routed_scaling_factor;
  }
}

}  // namespace
}  // namespace cuda

void CudaOps::RouteExperts(const Tensor& logits, const Tensor& bias, const RoutingConfig& config,
                           const Tensor& experts, const Tensor& weights) {
  CheckRouteExperts(logits, bias, config, experts, weights);
  if (logits.dim(0) == 0) return;
  const auto num_experts = static_cast<int>(logits.dim(1));
  const int shared_words =
      2 * num_experts + config.n_group + cuda::WordsOf(num_experts) + cuda::WordsOf(config.n_group);
  const int shared_bytes = shared_words * static_cast<int>(sizeof(float));
  constexpr int kAlwaysThere = 48 << 10;
  if (shared_bytes > kAlwaysThere) {
    CUDA_CHECK(cudaFuncSetAttribute(cuda::RouteKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    shared_bytes));
  }
  cuda::RouteKernel<<<static_cast<unsigned>(logits.dim(0)), cuda::kWarp, shared_bytes, stream_>>>(
      cuda::Rows<const float>(logits), num_experts, bias.present() ? bias.data<float>() : nullptr,
      config, experts.data<int32_t>(), weights.data<float>());
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace fathom
