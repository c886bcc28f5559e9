// Two kernels:
//   few rows to a matrix   a warp per output, which streams one row of the weight past up to eight
//                          rows of x
//   more                   tiles of 64 rows × 64 outputs in shared memory

#include "kernels/cuda/linear_generic.h"

#include <algorithm>

#include "kernels/cuda/elements.cuh"

namespace fathom::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kFewRows = 8;
constexpr int kTile = 64;          // rows, and outputs
constexpr int kTileInputs = 32;    // of one step along K
constexpr int kMostRowTiles = 64;  // blocks along the rows; they loop over what is more

struct Stack {
  const void* x;
  int64_t x_stride;         // elements, between rows
  int64_t x_matrix_stride;  // between what two matrices read
  // Sorted row i reads row rows_of_x[i] / rows_of_x_divisor of x; null: row i.
  const int* rows_of_x;
  int rows_of_x_divisor;
  const float* x_factors;  // of x in 1×128
  int64_t x_factors_stride;
  const int* offsets;  // matrix e takes rows [offsets[e], offsets[e + 1]); null: all num_rows
  int num_rows;

  const void* weight;  // dense
  int num_matrices, outputs, inputs;
  const float* factors;  // F8_E4M3 only
  int64_t factors_stride, factors_matrix_stride;
  int row_offset, column_offset;  // as in Weight

  void* out;
  bool out_is_f32;
  int64_t out_stride, out_matrix_stride;

  __device__ int begin(int matrix) const { return offsets == nullptr ? 0 : offsets[matrix]; }
  __device__ int end(int matrix) const {
    return offsets == nullptr ? num_rows : offsets[matrix + 1];
  }
  __device__ int64_t x_row_of(int row) const {
    return rows_of_x == nullptr ? row : rows_of_x[row] / rows_of_x_divisor;
  }
  template <typename X>
  __device__ const X* x_row(int matrix, int row) const {
    return static_cast<const X*>(x) + matrix * x_matrix_stride + x_row_of(row) * x_stride;
  }
  template <typename X>
  __device__ float x_factor(int64_t x_row, int input) const {
    if constexpr (sizeof(X) > 1) return 1.0f;
    return x_factors[x_row * x_factors_stride + input / kFp8Block];
  }
  template <typename W>
  __device__ const W* weight_row(int matrix, int output) const {
    return static_cast<const W*>(weight) + (int64_t{matrix} * outputs + output) * inputs;
  }
  template <typename W>
  __device__ float factor(int matrix, int output, int input) const {
    if constexpr (sizeof(W) > 1) return 1.0f;
    return factors[matrix * factors_matrix_stride +
                   (output + row_offset) / kFp8Block * factors_stride +
                   (input + column_offset) / kFp8Block];
  }
  __device__ void Store(int matrix, int row, int output, float value) const {
    const int64_t place = matrix * out_matrix_stride + row * out_stride + output;
    if (out_is_f32) {
      static_cast<float*>(out)[place] = value;
    } else {
      static_cast<__nv_bfloat16*>(out)[place] = __float2bfloat16(value);
    }
  }
};

// kCount elements that lie beside each other and begin at a multiple of their size, as floats.
template <int kCount, typename Element>
__device__ void Load(const Element* from, float (&to)[kCount]) {
  if constexpr (kCount == 1) {
    to[0] = ToFloat(*from);
  } else {
    constexpr int kPerLoad = 16 / sizeof(Element);
    static_assert(kCount % kPerLoad == 0 || kCount < kPerLoad);
    if constexpr (kCount < kPerLoad) {  // x is narrower than the weight: 8 bytes
      static_assert(kCount * sizeof(Element) == 8);
      const uint2 bits = *reinterpret_cast<const uint2*>(from);
      const auto* elements = reinterpret_cast<const Element*>(&bits);
#pragma unroll
      for (int i = 0; i < kCount; ++i) to[i] = ToFloat(elements[i]);
    } else {
#pragma unroll
      for (int piece = 0; piece < kCount; piece += kPerLoad) {
        const uint4 bits = *reinterpret_cast<const uint4*>(from + piece);
        const auto* elements = reinterpret_cast<const Element*>(&bits);
#pragma unroll
        for (int i = 0; i < kPerLoad; ++i) to[piece + i] = ToFloat(elements[i]);
      }
    }
  }
}

// kAtOnce inputs per lane and load: 16 bytes of the weight, or 1 where rows are not aligned.
template <typename X, typename W, int kAtOnce>
__global__ __launch_bounds__(kThreads) void FewRowsKernel(const Stack stack) {
  const int matrix = blockIdx.y;
  const int output = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  LetDependentsLaunch();
  WaitForPredecessors();
  if (output >= stack.outputs) return;
  const W* weight = stack.weight_row<W>(matrix, output);
  const int end = stack.end(matrix);
  for (int first = stack.begin(matrix); first < end; first += kFewRows) {
    const X* rows[kFewRows];
    int64_t x_rows[kFewRows];
    float sums[kFewRows] = {};
#pragma unroll
    for (int m = 0; m < kFewRows; ++m) {
      rows[m] = stack.x_row<X>(matrix, min(first + m, end - 1));
      x_rows[m] = stack.x_row_of(min(first + m, end - 1));
    }
    for (int k = lane * kAtOnce; k < stack.inputs; k += kWarp * kAtOnce) {
      float w[kAtOnce];
      Load(weight + k, w);
      const float factor = stack.factor<W>(matrix, output, k);
#pragma unroll
      for (int m = 0; m < kFewRows; ++m) {
        if (first + m < end) {
          float x[kAtOnce];
          Load(rows[m] + k, x);
          float sum = 0.0f;
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) sum += x[i] * w[i];
          sums[m] += sum * (factor * stack.x_factor<X>(x_rows[m], k));
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kFewRows; ++m) {
      const float sum = WarpSum(sums[m]);
      if (lane == m && first + m < end) stack.Store(matrix, first + m, output, sum);
    }
  }
}

template <typename X, typename W>
__global__ __launch_bounds__(kThreads) void TiledKernel(const Stack stack) {
  constexpr int kSide = 16;  // threads; each has 4 rows × 4 outputs, kSide apart
  constexpr int kEach = kTile / kSide;
  constexpr int kLoads = kTile * kTileInputs / kThreads;
  __shared__ float x_tile[kTileInputs][kTile + 1];
  __shared__ float w_tile[kTileInputs][kTile + 1];
  const int matrix = blockIdx.z;
  const int first_output = blockIdx.x * kTile;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const int load_k = threadIdx.x % kTileInputs, load_row = threadIdx.x / kTileInputs;
  LetDependentsLaunch();
  WaitForPredecessors();
  const int end = stack.end(matrix);

  for (int first = stack.begin(matrix) + blockIdx.y * kTile; first < end;
       first += gridDim.y * kTile) {
    const X* rows[kLoads];
    int64_t x_rows[kLoads];
    float sums[kEach][kEach] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int row = min(first + load_row + i * (kTile / kLoads), end - 1);
      rows[i] = stack.x_row<X>(matrix, row);
      x_rows[i] = stack.x_row_of(row);
    }
    for (int k = 0; k < stack.inputs; k += kTileInputs) {
      const int input = k + load_k;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int row = load_row + i * (kTile / kLoads);
        const int output = first_output + row;
        x_tile[load_k][row] = input < stack.inputs
                                  ? ToFloat(rows[i][input]) * stack.x_factor<X>(x_rows[i], input)
                                  : 0.0f;
        w_tile[load_k][row] = input < stack.inputs && output < stack.outputs
                                  ? ToFloat(stack.weight_row<W>(matrix, output)[input]) *
                                        stack.factor<W>(matrix, output, input)
                                  : 0.0f;
      }
      __syncthreads();
#pragma unroll 8
      for (int j = 0; j < kTileInputs; ++j) {
        float x[kEach], w[kEach];
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          x[i] = x_tile[j][ty + i * kSide];
          w[i] = w_tile[j][tx + i * kSide];
        }
#pragma unroll
        for (int m = 0; m < kEach; ++m) {
#pragma unroll
          for (int n = 0; n < kEach; ++n) sums[m][n] += x[m] * w[n];
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < kEach; ++m) {
#pragma unroll
      for (int n = 0; n < kEach; ++n) {
        const int row = first + ty + m * kSide, output = first_output + tx + n * kSide;
        if (row < end && output < stack.outputs) stack.Store(matrix, row, output, sums[m][n]);
      }
    }
  }
}

// --- the host's side

Stack StackOf(const LinearInput& x, const Weight& weight, const LinearSizes& sizes,
              const Tensor& out) {
  Stack stack = {};
  stack.x = x.values.raw();
  stack.x_stride = x.values.stride(0);
  if (x.quantized()) {
    stack.x_factors = x.scales.data<float>();
    stack.x_factors_stride = x.scales.stride(0);
  }
  stack.num_rows = static_cast<int>(sizes.rows);
  stack.weight = weight.values.raw();
  stack.num_matrices = static_cast<int>(sizes.experts);
  stack.outputs = static_cast<int>(sizes.outputs);
  stack.inputs = static_cast<int>(sizes.inputs);
  if (weight.values.dtype() == DType::kF8E4M3) {
    const Tensor& factors = weight.scale_inv;
    const int rank = factors.rank();
    stack.factors = factors.data<float>();
    stack.factors_stride = factors.dim(rank - 1);
    stack.factors_matrix_stride = factors.dim(rank - 2) * factors.dim(rank - 1);
    stack.row_offset = weight.row_offset;
    stack.column_offset = weight.column_offset;
  }
  stack.out = out.raw();
  stack.out_is_f32 = out.dtype() == DType::kF32;
  stack.out_stride = out.stride(0);
  return stack;
}

// Whether every row of x and of the weight begins at a multiple of 16 bytes and ends at one, and
// no 16 bytes of the weight stand in two blocks.
template <typename X, typename W>
bool IsAligned(const Stack& stack) {
  constexpr int64_t kBytes = 16, kAtOnce = kBytes / sizeof(W);
  const auto starts_well = [](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % kBytes == 0;
  };
  return starts_well(stack.x) && starts_well(stack.weight) && stack.inputs % kAtOnce == 0 &&
         stack.x_stride * sizeof(X) % kBytes == 0 &&
         stack.x_matrix_stride * sizeof(X) % kBytes == 0 && stack.column_offset % kAtOnce == 0;
}

template <typename X, typename W>
void Launch(const Stack& stack, cudaStream_t stream) {
  const auto blocks_of = [](int count, int size) {
    return static_cast<unsigned>((count + size - 1) / size);
  };
  const auto matrices = static_cast<unsigned>(stack.num_matrices);
  // How many rows an expert gets is known on the device alone: assume the mean.
  const int rows = stack.offsets == nullptr ? stack.num_rows : stack.num_rows / stack.num_matrices;
  if (rows <= kFewRows) {
    const dim3 blocks(blocks_of(stack.outputs, kThreads / kWarp), matrices);
    constexpr int kAtOnce = 16 / sizeof(W);
    const auto kernel =
        IsAligned<X, W>(stack) ? FewRowsKernel<X, W, kAtOnce> : FewRowsKernel<X, W, 1>;
    LaunchDependent(kernel, {blocks, dim3(kThreads)}, stream, stack);
  } else {
    const unsigned row_tiles = std::min<unsigned>(kMostRowTiles, blocks_of(stack.num_rows, kTile));
    const dim3 blocks(blocks_of(stack.outputs, kTile), row_tiles, matrices);
    LaunchDependent(TiledKernel<X, W>, {blocks, dim3(kThreads)}, stream, stack);
  }
}

void Multiply(const Stack& stack, DType x_type, DType weight_type, cudaStream_t stream) {
  if (stack.num_rows == 0 || stack.outputs == 0 || stack.num_matrices == 0) return;
  if (x_type == DType::kF8E4M3) {
    CHECK(weight_type == DType::kF8E4M3) << NameOf(weight_type);
    return Launch<__nv_fp8_e4m3, __nv_fp8_e4m3>(stack, stream);
  }
  VisitAct(x_type, [&](auto x) {
    VisitWeight(weight_type, [&](auto w) { Launch<decltype(x), decltype(w)>(stack, stream); });
  });
}

}  // namespace

void MultiplyGeneric(const LinearInput& x, const Weight& weight, const LinearSizes& sizes,
                     const Tensor& out, cudaStream_t stream) {
  Multiply(StackOf(x, weight, sizes, out), x.values.dtype(), weight.values.dtype(), stream);
}

void MultiplyHeads(const Tensor& x, const Tensor& weight, const Tensor& out, cudaStream_t stream) {
  const LinearSizes sizes = {.rows = x.dim(0),
                             .outputs = weight.dim(1),
                             .inputs = weight.dim(2),
                             .experts = weight.dim(0)};
  Stack stack = StackOf(x, {.values = weight}, sizes, out);
  stack.x_matrix_stride = x.stride(1);
  stack.out_matrix_stride = out.stride(1);
  Multiply(stack, x.dtype(), weight.dtype(), stream);
}

void MultiplyGroupedGeneric(const LinearInput& x, const ExpertGroups& groups, const Weight& weight,
                            int num_choices, const LinearSizes& sizes, const Tensor& out,
                            cudaStream_t stream) {
  Stack stack = StackOf(x, weight, sizes, out);
  stack.offsets = groups.offsets.data<int32_t>();
  if (num_choices > 0 && x.values.dim(0) * num_choices == sizes.rows) {
    stack.rows_of_x = groups.rows.data<int32_t>();
    stack.rows_of_x_divisor = num_choices;
  }
  Multiply(stack, x.values.dtype(), weight.values.dtype(), stream);
}

}  // namespace fathom::cuda
