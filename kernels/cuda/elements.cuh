// Elements of tensors in device code: as floats, and back, rounded to nearest, ties to even; one by
// one and eight at a time; and as the 1×128 of LinearInput.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "base/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/number_formats.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"

namespace fathom::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = ~0u;

__device__ inline float ToFloat(float value) { return value; }
__device__ inline float ToFloat(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float ToFloat(__nv_fp8_e4m3 value) { return static_cast<float>(value); }

__device__ inline void StoreFloat(float value, float* to) { *to = value; }
__device__ inline void StoreFloat(float value, __nv_bfloat16* to) { *to = __float2bfloat16(value); }

template <typename Element>
__device__ float RoundedTo(float value) {
  Element rounded;
  StoreFloat(value, &rounded);
  return ToFloat(rounded);
}

// --- eight elements beside each other: what a thread handles at a time

inline constexpr int kEight = 8;

// kAligned: all eight exist and begin at a multiple of 16 bytes. Otherwise only the first `count`
// exist (none if it is negative), and the others are 0.
template <bool kAligned, typename Element>
__device__ void LoadEight(const Element* from, int count, float (&to)[kEight]) {
  if constexpr (kAligned) {
    constexpr int kLoads = kEight * sizeof(Element) / 16;
    static_assert(kLoads >= 1);
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const uint4 bits = reinterpret_cast<const uint4*>(from)[load];
      const auto* elements = reinterpret_cast<const Element*>(&bits);
#pragma unroll
      for (int i = 0; i < kEight / kLoads; ++i)
        to[load * (kEight / kLoads) + i] = ToFloat(elements[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kEight; ++i) to[i] = i < count ? ToFloat(from[i]) : 0.0f;
  }
}
template <bool kAligned, typename Element>
__device__ void StoreEight(const float (&from)[kEight], int count, Element* to) {
  if constexpr (kAligned) {
    constexpr int kStores = kEight * sizeof(Element) / 16;
    static_assert(kStores >= 1);
#pragma unroll
    for (int store = 0; store < kStores; ++store) {
      uint4 bits;
      auto* elements = reinterpret_cast<Element*>(&bits);
#pragma unroll
      for (int i = 0; i < kEight / kStores; ++i) {
        StoreFloat(from[store * (kEight / kStores) + i], &elements[i]);
      }
      reinterpret_cast<uint4*>(to)[store] = bits;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if (i < count) StoreFloat(from[i], to + i);
    }
  }
}

// Eight elements as they lie in memory, which take fewer registers than floats.
template <typename Element>
struct alignas(16) PackedEight {
  Element elements[kEight];

  template <bool kAligned>
  __device__ void Load(const Element* from, int count) {
    if constexpr (kAligned) {
      constexpr int kLoads = kEight * sizeof(Element) / 16;
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        reinterpret_cast<uint4*>(elements)[load] = reinterpret_cast<const uint4*>(from)[load];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        StoreFloat(i < count ? ToFloat(from[i]) : 0.0f, &elements[i]);
      }
    }
  }
  __device__ void Clear() {
#pragma unroll
    for (Element& element : elements) StoreFloat(0.0f, &element);
  }
  __device__ float operator[](int i) const { return ToFloat(elements[i]); }
};

// Turns neighbouring pairs by the angles of `turns`: cosine, sine, cosine, sine, …
__device__ inline void RotateEight(const float (&turns)[kEight], float (&x)[kEight]) {
#pragma unroll
  for (int i = 0; i < kEight; i += 2) {
    const float even = x[i], odd = x[i + 1];
    x[i] = even * turns[i] - odd * turns[i + 1];
    x[i + 1] = even * turns[i + 1] + odd * turns[i];
  }
}

// --- sums and maxima

// Of a warp's values, in every lane.
__device__ inline float WarpSum(float value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  }
  return value;
}
// The largest among kLanes neighbours, in each of them. All lanes of the warp take part.
template <int kLanes = kWarp>
__device__ float WarpMax(float value) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, lanes));
  }
  return value;
}

// --- 1×128

inline constexpr int kGroupLanes = kFp8Block / kEight;

__device__ inline float FactorOf(float largest) {
  return fmaxf(largest, kSmallestQuantizedMagnitude) / kLargestE4M3;
}

// The codes of x / factor. Two corrected multiplications in place of a division; the quotient is
// the same (Markstein; a factor is never small enough for the inverse to overflow), and that of -0
// keeps its sign.
__device__ inline uint2 EncodeEight(const float (&x)[kEight], float factor) {
  const float inverse = __frcp_rn(factor);
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < kEight; i += 2) {
    float2 quotients;
    const float first = x[i] * inverse, second = x[i + 1] * inverse;
    quotients.x = copysignf(fmaf(fmaf(-first, factor, x[i]), inverse, first), x[i]);
    quotients.y = copysignf(fmaf(fmaf(-second, factor, x[i + 1]), inverse, second), x[i + 1]);
    words[i / 4] |= uint32_t{__nv_cvt_float2_to_fp8x2(quotients, __NV_SATFINITE, __NV_E4M3)}
                    << i % 4 * 8;
  }
  return make_uint2(words[0], words[1]);
}

template <bool kAligned>
__device__ void StoreCodes(uint2 codes, int count, uint8_t* to) {
  if constexpr (kAligned) {
    *reinterpret_cast<uint2*>(to) = codes;
  } else {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if (i < count) to[i] = static_cast<uint8_t>((i < 4 ? codes.x : codes.y) >> i % 4 * 8);
    }
  }
}

__device__ inline float LargestOf(const float (&x)[kEight]) {  // passes over NaN
  float largest = 0.0f;
#pragma unroll
  for (const float value : x) largest = fmaxf(largest, fabsf(value));
  return largest;
}

// The rows of a tensor of rank 2 in device code, or whatever else has a pointer and a stride.
template <typename Element>
struct Rows {
  Rows() = default;
  explicit Rows(const Tensor& tensor)
      : data(static_cast<Element*>(tensor.raw())),
        stride(tensor.present() ? tensor.stride(0) : 0) {}
  __device__ Element* operator[](int64_t row) const { return data + row * stride; }
  __host__ __device__ bool present() const { return data != nullptr; }

  Element* data = nullptr;
  int64_t stride = 0;  // elements
};

// A LinearInput that is written: in act, or in 1×128 if it has scales.
struct OutputRows {
  explicit OutputRows(const LinearInput& out) : values(out.values), scales(out.scales) {}

  // Elements [column, column + 8) of a row, which were rounded to Act: all lanes of a warp, each
  // eight elements behind the lane before it, sixteen to a group; count says how many exist.
  template <typename Act, bool kAligned>
  __device__ void Store(const float (&rounded)[kEight], int64_t row, int column, int count) const {
    if (!scales.present()) {
      Act* to = reinterpret_cast<Act*>(values.data) + row * values.stride + column;
      if (count > 0) StoreEight<kAligned>(rounded, count, to);
      return;
    }
    const float factor = FactorOf(WarpMax<kGroupLanes>(LargestOf(rounded)));
    if (count <= 0) return;
    StoreCodes<kAligned>(EncodeEight(rounded, factor), count, values[row] + column);
    if (column % kFp8Block == 0) scales[row][column / kFp8Block] = factor;
  }

  Rows<uint8_t> values;  // or of Act
  Rows<float> scales;
};

// --- the host's side

// Calls fn with a value of the element's type in device code: float, __nv_bfloat16.
template <typename Fn>
void VisitAct(DType dtype, Fn&& fn) {
  if (dtype == DType::kF32) {
    fn(float{});
  } else {
    CHECK(dtype == DType::kBF16) << NameOf(dtype);
    fn(__nv_bfloat16{});
  }
}
// The same for weights, which may be __nv_fp8_e4m3 too.
template <typename Fn>
void VisitWeight(DType dtype, Fn&& fn) {
  if (dtype == DType::kF8E4M3) {
    fn(__nv_fp8_e4m3{});
  } else {
    VisitAct(dtype, fn);
  }
}
// Calls fn with true_type or false_type.
template <typename Fn>
void VisitBool(bool value, Fn&& fn) {
  if (value) {
    fn(std::true_type{});
  } else {
    fn(std::false_type{});
  }
}

// Whether every row begins at a multiple of 16 bytes (of 8 if elements are single bytes) and holds
// a multiple of eight elements; true for an absent tensor.
inline bool IsAlignedForEight(const Tensor& tensor) {
  if (!tensor.present()) return true;
  const int64_t bytes = SizeOf(tensor.dtype()) == 1 ? 8 : 16;
  bool aligned = reinterpret_cast<uintptr_t>(tensor.raw()) % bytes == 0 &&
                 tensor.dim(tensor.rank() - 1) % kEight == 0;
  for (int i = 0; i + 1 < tensor.rank(); ++i) {
    aligned = aligned && tensor.stride(i) * SizeOf(tensor.dtype()) % bytes == 0;
  }
  return aligned;
}
template <typename... Tensors>
bool AreAlignedForEight(const Tensors&... tensors) {
  return (IsAlignedForEight(tensors) && ...);
}

constexpr int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Kernels of loose threads have blocks of this many.
inline constexpr int kRowThreads = 256;

// Launches kernel(arguments...) with at least `num_threads` threads, unless that is none.
template <typename... Parameters, typename... Arguments>
void LaunchThreads(void (*kernel)(Parameters...), int64_t num_threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (num_threads == 0) return;
  const auto blocks = static_cast<unsigned>(DivideUp(num_threads, kRowThreads));
  LaunchDependent(kernel, {dim3(blocks), dim3(kRowThreads)}, stream, arguments...);
}

}  // namespace fathom::cuda
