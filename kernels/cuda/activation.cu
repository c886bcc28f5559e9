#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/shape_checks.h"

namespace fathom {
namespace cuda {
namespace {

template <typename Act>
__global__ void SwiGluKernel(Rows<Act> gate_up, Rows<Act> out, int size) {
  const Act* gate = gate_up[blockIdx.x];
  Act* target = out[blockIdx.x];
  for (int i = threadIdx.x; i < size; i += kRowThreads) {
    const float value = ToFloat(gate[i]);
    StoreFloat(value / (1.0f + expf(-value)) * ToFloat(gate[size + i]), target + i);
  }
}

template <typename Act>
__global__ void ClearKernel(Rows<Act> out, int size) {
  for (int i = threadIdx.x; i < size; i += kRowThreads) StoreFloat(0.0f, out[blockIdx.x] + i);
}

template <typename Act>
__global__ void AddKernel(Rows<Act> x, Rows<Act> y, int size) {
  Act* target = x[blockIdx.x];
  const Act* source = y[blockIdx.x];
  for (int i = threadIdx.x; i < size; i += kRowThreads) {
    StoreFloat(ToFloat(target[i]) + ToFloat(source[i]), target + i);
  }
}

template <typename Element>
__global__ void GatherRowsKernel(Rows<Element> x, const int* rows, int64_t rows_stride,
                                 Rows<Element> out, int size) {
  const Element* source = x[rows[blockIdx.x * rows_stride]];
  for (int i = threadIdx.x; i < size; i += kRowThreads) out[blockIdx.x][i] = source[i];
}

}  // namespace
}  // namespace cuda

void CudaOps::SwiGlu(const Tensor& gate_up, const Tensor& out) {
  CheckSwiGlu(gate_up, out);
  cuda::VisitAct(out.dtype(), [&](auto act) {
    using Act = decltype(act);
    cuda::LaunchRows(cuda::SwiGluKernel<Act>, out.dim(0), stream_, cuda::Rows<Act>(gate_up),
                     cuda::Rows<Act>(out), static_cast<int>(out.dim(1)));
  });
}

void CudaOps::Clear(const Tensor& out) {
  CheckClear(out);
  cuda::VisitAct(out.dtype(), [&](auto act) {
    using Act = decltype(act);
    cuda::LaunchRows(cuda::ClearKernel<Act>, out.dim(0), stream_, cuda::Rows<Act>(out),
                     static_cast<int>(out.dim(1)));
  });
}

void CudaOps::Add(const Tensor& x, const Tensor& y) {
  CheckAdd(x, y);
  cuda::VisitAct(x.dtype(), [&](auto act) {
    using Act = decltype(act);
    cuda::LaunchRows(cuda::AddKernel<Act>, x.dim(0), stream_, cuda::Rows<Act>(x),
                     cuda::Rows<Act>(y), static_cast<int>(x.dim(1)));
  });
}

void CudaOps::GatherRows(const Tensor& x, const Tensor& rows, const Tensor& out) {
  CheckGatherRows(x, rows, out);
  const auto launch = [&](auto element) {
    using Element = decltype(element);
    cuda::LaunchRows(cuda::GatherRowsKernel<Element>, out.dim(0), stream_, cuda::Rows<Element>(x),
                     rows.data<int32_t>(), rows.stride(0), cuda::Rows<Element>(out),
                     static_cast<int>(out.dim(1)));
  };
  switch (SizeOf(x.dtype())) {
    case 1:
      return launch(uint8_t{});
    case 2:
      return launch(uint16_t{});
    default:
      return launch(uint32_t{});
  }
}

}  // namespace fathom
