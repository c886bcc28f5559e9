#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/shape_checks.h"

namespace fathom {
namespace cuda {
namespace {

constexpr int kWarps = kRowThreads / kWarp;

// Sums of one number per warp, for all threads. Synchronises the block.
__device__ int BlockSum(int warp_value, int (&values)[kWarps]) {
  __syncthreads();
  if (threadIdx.x % kWarp == 0) values[threadIdx.x / kWarp] = warp_value;
  __syncthreads();
  int sum = 0;
  for (const int value : values) sum += value;
  return sum;
}

// A block of threads for each expert: it counts the choices of the experts before its own, which is
// where its rows begin, then writes its own in order.
__global__ void GroupKernel(const int* choices, int num_rows, int first_expert, int* rows,
                            int* offsets) {
  __shared__ int warp_counts[kWarps];
  const int mine = blockIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int last = first_expert + mine;

  int before = 0;
  for (int i = threadIdx.x; i < num_rows; i += kRowThreads) {
    before += choices[i] >= first_expert && choices[i] < last;
  }
  int begin = BlockSum(__reduce_add_sync(kAllLanes, before), warp_counts);
  if (threadIdx.x == 0) offsets[mine] = begin;

  for (int first = 0; first < num_rows; first += kRowThreads) {
    const int row = first + static_cast<int>(threadIdx.x);
    const bool is_mine = row < num_rows && choices[row] == last;
    const unsigned lanes = __ballot_sync(kAllLanes, is_mine);
    const int count = BlockSum(__popc(lanes), warp_counts);
    int place = begin + __popc(lanes & ((1u << lane) - 1));
    for (int w = 0; w < warp; ++w) place += warp_counts[w];
    if (is_mine) rows[place] = row;
    begin += count;
  }
  if (mine == gridDim.x - 1 && threadIdx.x == 0) offsets[mine + 1] = begin;
}

__global__ void FindPlacesKernel(const int* rows, const int* num_sorted, int num_rows,
                                 int* places) {
  const int place = static_cast<int>(blockIdx.x * kRowThreads + threadIdx.x);
  if (place < min(*num_sorted, num_rows)) places[rows[place]] = place;
}

// out += Σ weights[j] * y[places[j]]; a place of -1 is another rank's.
template <typename Act>
__global__ void CombineKernel(Rows<Act> y, const int* places, const float* weights, int choices,
                              Rows<Act> out, int size) {
  const int64_t token = blockIdx.x;
  for (int i = threadIdx.x; i < size; i += kRowThreads) {
    float sum = 0.0f;
    for (int j = 0; j < choices; ++j) {
      const int place = places[token * choices + j];
      if (place >= 0) sum += weights[token * choices + j] * ToFloat(y[place][i]);
    }
    StoreFloat(ToFloat(out[token][i]) + sum, out[token] + i);
  }
}

}  // namespace
}  // namespace cuda

void CudaOps::GroupByExpert(const Tensor& experts, int first_expert, const ExpertGroups& groups) {
  CheckGroupByExpert(experts, groups);
  const int64_t num_experts = groups.offsets.dim(0) - 1;
  if (num_experts == 0) {
    CUDA_CHECK(cudaMemsetAsync(groups.offsets.raw(), 0, sizeof(int32_t), stream_));
    return;
  }
  cuda::LaunchRows(cuda::GroupKernel, num_experts, stream_, experts.data<int32_t>(),
                   static_cast<int>(experts.num_elements()), first_expert,
                   groups.rows.data<int32_t>(), groups.offsets.data<int32_t>());
}

void CudaOps::CombineExperts(const Tensor& y, const ExpertGroups& groups, const Tensor& weights,
                             const Tensor& out) {
  CheckCombineExperts(y, groups, weights, out);
  const int64_t num_rows = weights.num_elements();
  const int64_t places_bytes = num_rows * static_cast<int64_t>(sizeof(int));
  auto* places = static_cast<int*>(places_memory_.Reserve(places_bytes));
  CUDA_CHECK(cudaMemsetAsync(places, 0xff, static_cast<size_t>(places_bytes), stream_));
  const auto* offsets = groups.offsets.data<int32_t>();
  cuda::LaunchRows(cuda::FindPlacesKernel, (num_rows + cuda::kRowThreads - 1) / cuda::kRowThreads,
                   stream_, groups.rows.data<int32_t>(), offsets + groups.offsets.dim(0) - 1,
                   static_cast<int>(num_rows), places);
  cuda::VisitAct(out.dtype(), [&](auto act) {
    using Act = decltype(act);
    cuda::LaunchRows(cuda::CombineKernel<Act>, out.dim(0), stream_, cuda::Rows<Act>(y), places,
                     weights.data<float>(), static_cast<int>(weights.dim(1)), cuda::Rows<Act>(out),
                     static_cast<int>(out.dim(1)));
  });
}

}  // namespace fathom
