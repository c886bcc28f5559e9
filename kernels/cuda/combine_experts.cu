// What the experts computed, gathered again by token: each output is read by one thread from all
// of its token's rows at once.

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/expert_chunks.h"
#include "kernels/shape_checks.h"

namespace fathom {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kInFlight = 9;  // rows of a token that are asked for before the first is used

template <typename Act, bool kAligned>
__global__ __launch_bounds__(kThreads, 8) void CombineKernel(Rows<const Act> y, const int* places,
                                                             const float* weights, int choices,
                                                             bool accumulate, Rows<Act> out,
                                                             int size) {
  LetDependentsLaunch();
  const int parts = (size + kThreads * kEight - 1) / (kThreads * kEight);
  const int64_t token = blockIdx.x / parts;
  const int column = (blockIdx.x % parts * kThreads + threadIdx.x) * kEight;
  const int count = size - column;
  WaitForPredecessors();
  if (count <= 0) return;
  float sums[kEight] = {};
  for (int first = 0; first < choices; first += kInFlight) {
    PackedEight<Act> values[kInFlight];
    float shares[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t choice = token * choices + first + j;
      const int place = first + j < choices ? places[choice] : -1;  // -1: another rank's
      shares[j] = place >= 0 ? weights[choice] : 0.0f;
      if (place >= 0) {
        values[j].template Load<kAligned>(y[place] + column, count);
      } else {
        values[j].Clear();
      }
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
#pragma unroll
      for (int i = 0; i < kEight; ++i) sums[i] += shares[j] * values[j][i];
    }
  }
  Act* target = out[token] + column;
  if (accumulate) {
    float before[kEight];
    LoadEight<kAligned>(target, count, before);
#pragma unroll
    for (int i = 0; i < kEight; ++i) sums[i] += before[i];
  }
  StoreEight<kAligned>(sums, count, target);
}

}  // namespace
}  // namespace cuda

void CudaOps::CombineExperts(const Tensor& y, const Routes& routes, bool accumulate,
                             const Tensor& out) {
  CheckCombineExperts(y, routes, out);
  if (out.num_elements() == 0) return;
  CHECK(routes.groups.notes.present()) << "Route left no notes";
  const int64_t num_rows = routes.groups.rows.dim(0);
  const int64_t experts = routes.groups.offsets.dim(0) - 1;
  const int* places = routes.groups.notes.data<int32_t>() + PlacesNote(experts, num_rows);
  const int64_t parts = cuda::DivideUp(out.dim(1), cuda::kThreads * cuda::kEight);
  const cuda::LaunchShape shape = {dim3(static_cast<unsigned>(out.dim(0) * parts)),
                                   dim3(cuda::kThreads)};
  cuda::VisitAct(out.dtype(), [&](auto act) {
    cuda::VisitBool(cuda::AreAlignedForEight(y, out), [&](auto is_aligned) {
      using Act = decltype(act);
      cuda::LaunchDependent(cuda::CombineKernel<Act, decltype(is_aligned)::value>, shape, stream_,
                            cuda::Rows<const Act>(y), places, routes.weights.data<float>(),
                            static_cast<int>(routes.weights.dim(1)), accumulate,
                            cuda::Rows<Act>(out), static_cast<int>(out.dim(1)));
    });
  });
}

}  // namespace fathom
