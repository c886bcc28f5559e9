#include "kernels/cuda/quantize.h"

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/number_formats.h"
#include "kernels/random_bits.h"
#include "kernels/shape_checks.h"

namespace fathom {
namespace cuda {
namespace {

// What writes weights never calls LetDependentsLaunch: kernels read weights before they wait.

template <typename Stored>
__device__ void LoadStored(const Stored* from, bool aligned, int count, float (&to)[kEight]) {
  if constexpr (sizeof(Stored) == 1) {
    if (aligned) {
      const uint2 bits = *reinterpret_cast<const uint2*>(from);
      const auto* elements = reinterpret_cast<const Stored*>(&bits);
#pragma unroll
      for (int i = 0; i < kEight; ++i) to[i] = ToFloat(elements[i]);
      return;
    }
  } else if (aligned) {
    return LoadEight<true>(from, count, to);
  }
  LoadEight<false>(from, count, to);
}

// A thread has eight columns of a row; `same_factor` if they always share one.
template <typename Stored, typename To, bool kAligned>
__global__ void DequantizeKernel(Rows<const Stored> values, Rows<const float> factors,
                                 int row_offset, int column_offset, Rows<To> out, int64_t num_rows,
                                 int columns) {
  WaitForPredecessors();
  const int pieces = (columns + kEight - 1) / kEight;
  const int64_t index = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  const int64_t row = index / pieces;
  const int column = static_cast<int>(index % pieces) * kEight, count = columns - column;
  if (row >= num_rows) return;
  float x[kEight];
  LoadStored(values[row] + column, kAligned, count, x);
  if constexpr (sizeof(Stored) == 1) {
    const float* row_factors = factors[(row + row_offset) / kFp8Block];
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if (i < count) x[i] *= row_factors[(column + i + column_offset) / kFp8Block];
    }
  }
  StoreEight<kAligned>(x, count, out[row] + column);
}

// One 128×128 block of the matrix for each block of threads, which keeps it in registers: sixteen
// lanes have a row.
template <typename From, bool kAligned>
__global__ __launch_bounds__(kRowThreads) void QuantizeBlockKernel(Rows<const From> x,
                                                                   int64_t num_rows,
                                                                   int64_t num_columns,
                                                                   Rows<uint8_t> values,
                                                                   Rows<float> factors) {
  constexpr int kRowsAtOnce = kRowThreads / kGroupLanes, kLoads = kFp8Block / kRowsAtOnce;
  __shared__ float warp_values[kRowThreads / kWarp];
  WaitForPredecessors();
  const int64_t block_column = blockIdx.x, block_row = blockIdx.y;
  const int64_t column =
      block_column * kFp8Block + static_cast<int>(threadIdx.x) % kGroupLanes * kEight;
  const int64_t first_row = block_row * kFp8Block + threadIdx.x / kGroupLanes;
  const auto count = static_cast<int>(min(num_columns - column, int64_t{kEight}));
  float loaded[kLoads][kEight];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t row = first_row + i * kRowsAtOnce;
    if (row < num_rows && count > 0) {
      LoadEight<kAligned>(x[row] + column, count, loaded[i]);
    } else {
#pragma unroll
      for (float& value : loaded[i]) value = 0.0f;
    }
  }
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) largest = fmaxf(largest, LargestOf(loaded[i]));
  largest = WarpMax(largest);
  if (threadIdx.x % kWarp == 0) warp_values[threadIdx.x / kWarp] = largest;
  __syncthreads();
  for (const float part : warp_values) largest = fmaxf(largest, part);

  // A block of zeros, or of numbers so small that their factor would be zero, has factor 1.
  const float quotient = largest / kLargestE4M3;
  const float factor = quotient > 0.0f ? quotient : 1.0f;
  if (threadIdx.x == 0) factors[block_row][block_column] = factor;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t row = first_row + i * kRowsAtOnce;
    if (row < num_rows && count > 0) {
      StoreCodes<kAligned>(EncodeEight(loaded[i], factor), count, values[row] + column);
    }
  }
}

template <typename Act, bool kAligned>
__global__ void QuantizeRowsKernel(Rows<const Act> x, OutputRows out, int64_t num_rows, int size) {
  LetDependentsLaunch();
  WaitForPredecessors();
  const int groups = (size + kFp8Block - 1) / kFp8Block;
  const int64_t unit = (int64_t{blockIdx.x} * kRowThreads + threadIdx.x) / kGroupLanes;
  const int64_t row = unit / groups;
  const int column = static_cast<int>(unit % groups) * kFp8Block +
                     static_cast<int>(threadIdx.x) % kGroupLanes * kEight;
  const int count = row < num_rows ? size - column : 0;
  float values[kEight] = {};
  if (count > 0) LoadEight<kAligned>(x[row] + column, count, values);
  out.Store<Act, kAligned>(values, row, column, count);
}

// Sixteen bytes to a thread.
template <typename Element>
__global__ void FillRandomKernel(Element* out, int64_t count, float amplitude, uint64_t seed) {
  constexpr int kElements = 16 / sizeof(Element);
  WaitForPredecessors();
  const int64_t first = (int64_t{blockIdx.x} * kRowThreads + threadIdx.x) * kElements;
  if (first >= count) return;
  uint4 bits;
  auto* elements = reinterpret_cast<Element*>(&bits);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const auto index = static_cast<uint64_t>(first + i);
    if constexpr (sizeof(Element) == 1) {
      elements[i] = RandomE4M3(seed, index).bits;
    } else {
      StoreFloat(amplitude * RandomUnit(seed, index), &elements[i]);
    }
  }
  if (first + kElements <= count && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    *reinterpret_cast<uint4*>(out + first) = bits;
    return;
  }
  for (int i = 0; i < kElements && first + i < count; ++i) out[first + i] = elements[i];
}

}  // namespace

void QuantizeRows(const Tensor& x, const LinearInput& out, cudaStream_t stream) {
  VisitAct(x.dtype(), [&](auto act) {
    VisitBool(AreAlignedForEight(x, out.values), [&](auto is_aligned) {
      using Act = decltype(act);
      LaunchThreads(QuantizeRowsKernel<Act, decltype(is_aligned)::value>,
                    x.dim(0) * DivideUp(x.dim(1), kFp8Block) * kGroupLanes, stream,
                    Rows<const Act>(x), OutputRows(out), x.dim(0), static_cast<int>(x.dim(1)));
    });
  });
}

}  // namespace cuda

void CudaOps::Dequantize(const Weight& weight, const Tensor& out) {
  CheckDequantize(weight, out);
  const int64_t pieces = out.dim(0) * cuda::DivideUp(out.dim(1), cuda::kEight);
  const bool aligned = cuda::AreAlignedForEight(weight.values, out);
  cuda::VisitWeight(weight.values.dtype(), [&](auto stored) {
    cuda::VisitAct(out.dtype(), [&](auto to) {
      cuda::VisitBool(aligned, [&](auto is_aligned) {
        using Stored = decltype(stored);
        using To = decltype(to);
        cuda::LaunchThreads(cuda::DequantizeKernel<Stored, To, decltype(is_aligned)::value>, pieces,
                            stream_, cuda::Rows<const Stored>(weight.values),
                            cuda::Rows<const float>(weight.scale_inv), weight.row_offset,
                            weight.column_offset, cuda::Rows<To>(out), out.dim(0),
                            static_cast<int>(out.dim(1)));
      });
    });
  });
}

void CudaOps::QuantizeFp8(const Tensor& x, const Weight& out) {
  CheckQuantizeFp8(x, out);
  if (x.num_elements() == 0) return;
  const dim3 blocks(static_cast<unsigned>(cuda::DivideUp(x.dim(1), kFp8Block)),
                    static_cast<unsigned>(cuda::DivideUp(x.dim(0), kFp8Block)));
  cuda::VisitAct(x.dtype(), [&](auto from) {
    cuda::VisitBool(cuda::AreAlignedForEight(x, out.values), [&](auto is_aligned) {
      using From = decltype(from);
      cuda::LaunchDependent(cuda::QuantizeBlockKernel<From, decltype(is_aligned)::value>,
                            {blocks, dim3(cuda::kRowThreads)}, stream_, cuda::Rows<const From>(x),
                            x.dim(0), x.dim(1), cuda::Rows<uint8_t>(out.values),
                            cuda::Rows<float>(out.scale_inv));
    });
  });
}

void CudaOps::FillRandom(const Tensor& out, float amplitude, uint64_t seed) {
  CheckFillRandom(out);
  const int64_t count = out.num_elements();
  const int64_t threads = cuda::DivideUp(count * SizeOf(out.dtype()), 16);
  if (out.dtype() == DType::kF8E4M3) {
    cuda::LaunchThreads(cuda::FillRandomKernel<uint8_t>, threads, stream_, out.data<uint8_t>(),
                        count, amplitude, seed);
    return;
  }
  cuda::VisitAct(out.dtype(), [&](auto act) {
    using Act = decltype(act);
    cuda::LaunchThreads(cuda::FillRandomKernel<Act>, threads, stream_, static_cast<Act*>(out.raw()),
                        count, amplitude, seed);
  });
}

}  // namespace fathom
