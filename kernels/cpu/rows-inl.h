// What several operations do to a row, for the target that is being compiled: add, normalise,
// rotate, quantise. Included once per target like vector-inl.h, hence this guard in place of
// `#pragma once`.
#if defined(FATHOM_KERNELS_CPU_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FATHOM_KERNELS_CPU_ROWS_INL_H_
#undef FATHOM_KERNELS_CPU_ROWS_INL_H_
#else
#define FATHOM_KERNELS_CPU_ROWS_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/vector-inl.h"
#include "kernels/number_formats.h"
#include "kernels/ops.h"

HWY_BEFORE_NAMESPACE();
namespace fathom {
namespace HWY_NAMESPACE {

// x += y
template <typename Act>
HWY_INLINE void AddRow(Act* x, const Act* y, size_t size) {
  for (size_t i = 0; i < size; i += kLanes) {
    const FloatVec sum = hn::Add(LoadUpTo(x + i, size - i), LoadUpTo(y + i, size - i));
    StoreUpTo(sum, x + i, size - i);
  }
}

// Four sums, so that one addition need not wait for the other.
template <typename Act>
HWY_INLINE float SumOfSquares(const Act* row, size_t size) {
  constexpr size_t kSums = 4;
  FloatVec sums[kSums];
  for (FloatVec& sum : sums) sum = hn::Zero(FloatTag());
  for (size_t i = 0; i < size; i += kSums * kLanes) {
    HWY_UNROLL(4)
    for (size_t j = 0; j < kSums; ++j) {
      const size_t begin = i + j * kLanes;
      if (begin >= size) break;
      const FloatVec x = LoadUpTo(row + begin, size - begin);
      sums[j] = hn::MulAdd(x, x, sums[j]);
    }
  }
  return SumOf(hn::Add(hn::Add(sums[0], sums[1]), hn::Add(sums[2], sums[3])));
}

// out = row / sqrt(mean(row²) + eps) * gain; may be in place.
template <typename Act, typename Gain>
HWY_INLINE void NormalizeRow(const Act* row, const Gain* gain, size_t size, float eps, Act* out) {
  const float mean = SumOfSquares(row, size) / static_cast<float>(size);
  const FloatVec factor = hn::Set(FloatTag(), 1.0f / std::sqrt(mean + eps));
  for (size_t i = 0; i < size; i += kLanes) {
    const FloatVec normal = hn::Mul(LoadUpTo(row + i, size - i), factor);
    StoreUpTo(hn::Mul(normal, LoadUpTo(gain + i, size - i)), out + i, size - i);
  }
}

// Turns neighbouring pairs by the angles of `turn`: cosine, sine, cosine, sine, … May be in place.
template <typename Act>
HWY_INLINE void RotateRow(const Act* row, const float* turn, int64_t size, Act* out) {
  for (int64_t i = 0; i < size; i += 2) {
    const float even = ToFloat(row[i]);
    const float odd = ToFloat(row[i + 1]);
    StoreFloat(even * turn[i] - odd * turn[i + 1], out + i);
    StoreFloat(even * turn[i + 1] + odd * turn[i], out + i + 1);
  }
}

// The codes of ToFloat8E4M3, each in the lowest byte of its lane.
HWY_INLINE hn::Vec<hn::Rebind<int32_t, FloatTag>> EncodeE4M3(FloatVec x) {
  const FloatTag d;
  const hn::Rebind<int32_t, FloatTag> d32;
  const auto bits = hn::BitCast(d32, x);
  const auto sign = hn::And(hn::ShiftRight<24>(bits), hn::Set(d32, 0x80));
  const FloatVec magnitude = hn::Abs(x);
  const auto magnitude_bits = hn::BitCast(d32, magnitude);

  const auto is_odd = hn::And(hn::ShiftRight<20>(magnitude_bits), hn::Set(d32, 1));
  const auto rounded = hn::Add(magnitude_bits, hn::Add(is_odd, hn::Set(d32, 0x7ffff)));
  const auto normal = hn::Sub(hn::ShiftRight<20>(rounded), hn::Set(d32, 120 << 3));
  const auto subnormal =
      hn::And(hn::BitCast(d32, hn::Add(magnitude, hn::Set(d, 0x1p14f))), hn::Set(d32, 0xf));

  const auto is_subnormal = hn::RebindMask(d32, hn::Lt(magnitude, hn::Set(d, 0x1p-6f)));
  const auto is_large = hn::RebindMask(d32, hn::Ge(magnitude, hn::Set(d, kLargestE4M3)));
  const auto is_nan = hn::RebindMask(d32, hn::IsNaN(x));
  auto code = hn::IfThenElse(is_subnormal, subnormal, normal);
  code = hn::IfThenElse(is_large, hn::Set(d32, 0x7e), code);
  code = hn::IfThenElse(is_nan, hn::Set(d32, 0x7f), code);
  return hn::Or(sign, code);
}

// The larger of `most` and each element's magnitude, lane by lane. NaN does not count.
template <typename Element>
HWY_INLINE FloatVec LargestMagnitudes(const Element* from, size_t count, FloatVec most) {
  for (size_t k = 0; k < count; k += kLanes) {
    const FloatVec magnitude = hn::Abs(LoadUpTo(from + k, count - k));
    most = hn::Max(most, hn::IfThenZeroElse(hn::IsNaN(magnitude), magnitude));
  }
  return most;
}

template <typename Element>
HWY_INLINE void EncodeElements(const Element* from, size_t count, float factor, uint8_t* codes) {
  const hn::Rebind<uint8_t, FloatTag> d8;
  const FloatVec divisor = hn::Set(FloatTag(), factor);
  for (size_t k = 0; k < count; k += kLanes) {
    uint8_t encoded[kVectorFloats];
    hn::StoreU(hn::DemoteTo(d8, EncodeE4M3(hn::Div(LoadUpTo(from + k, count - k), divisor))), d8,
               encoded);
    std::copy_n(encoded, std::min(kLanes, count - k), codes + k);
  }
}

// A row in 1×128, as LinearInput says. store_factor(group, factor) is called for each group.
template <typename Act, typename StoreFactor>
HWY_INLINE void QuantizeRow(const Act* row, size_t size, uint8_t* codes,
                            const StoreFactor& store_factor) {
  for (size_t begin = 0; begin < size; begin += kFp8Block) {
    const size_t count = std::min<size_t>(kFp8Block, size - begin);
    const float largest = LargestOf(LargestMagnitudes(row + begin, count, hn::Zero(FloatTag())));
    const float factor = std::max(largest, kSmallestQuantizedMagnitude) / kLargestE4M3;
    store_factor(begin / kFp8Block, factor);
    EncodeElements(row + begin, count, factor, codes + begin);
  }
}

// Row t of a quantised LinearInput.
template <typename Act>
HWY_INLINE void QuantizeRow(const Act* row, const LinearInput& out, int64_t t) {
  float* factors = out.scales.data<float>() + t * out.scales.stride(0);
  QuantizeRow(row, static_cast<size_t>(out.values.dim(1)),
              out.values.data<uint8_t>() + t * out.values.stride(0),
              [factors](size_t group, float factor) { factors[group] = factor; });
}

}  // namespace HWY_NAMESPACE
}  // namespace fathom
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
