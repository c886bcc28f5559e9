// Vectors of floats for the target that is being compiled: loads and stores in every element type,
// and exp. Included once per target by files that Highway compiles again and again, hence this
// guard in place of `#pragma once`.
//
// A loop's last, shorter part goes through the same vector arithmetic as the rest, on a copy padded
// with zeros. So the bits of an element never depend on how far it stands from the end.
#if defined(FATHOM_KERNELS_CPU_VECTOR_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FATHOM_KERNELS_CPU_VECTOR_INL_H_
#undef FATHOM_KERNELS_CPU_VECTOR_INL_H_
#else
#define FATHOM_KERNELS_CPU_VECTOR_INL_H_
#endif

#include <cstddef>
#include <cstring>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/cpu/scratch.h"
#include "kernels/number_formats.h"

HWY_BEFORE_NAMESPACE();
namespace fathom {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::CappedTag<float, kVectorFloats>;
using FloatVec = hn::Vec<FloatTag>;

inline constexpr size_t kLanes = hn::MaxLanes(FloatTag());
static_assert(kVectorFloats % kLanes == 0);

// Rows and outputs of a register tile; sums, one row's inputs and a weight fit 32 or 16 registers.
inline constexpr int kTileRows = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64 ? 6 : 3;
inline constexpr int kTileOutputs = 4;

// Rows of each tile when as few tiles as possible share num_rows > 0: 8 rows are 4 + 4, not 6 + 2,
// because a tile of few rows uses what it loads too little.
constexpr int TileRowsFor(int num_rows) {
  const int num_tiles = (num_rows + kTileRows - 1) / kTileRows;
  return (num_rows + num_tiles - 1) / num_tiles;
}

// LoadFloats yields element / kLoadFactor.
template <typename Element>
inline constexpr float kLoadFactor = 1.0f;
template <>
inline constexpr float kLoadFactor<Float8E4M3> = 256.0f;

HWY_INLINE FloatVec LoadFloats(const float* from) { return hn::LoadU(FloatTag(), from); }

HWY_INLINE FloatVec LoadFloats(const BFloat16* from) {
  const FloatTag d;
  const hn::Rebind<uint16_t, FloatTag> d16;
  const hn::Rebind<uint32_t, FloatTag> d32;
  const auto bits = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(from));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, bits)));
}

// Moves the bits of a code into a half float, whose exponent has a bias larger by 8 and whose
// subnormal numbers include those of E4M3: exact, and every CPU converts half floats at full speed.
HWY_INLINE FloatVec LoadFloats(const Float8E4M3* from) {
  const FloatTag d;
  const hn::Rebind<uint8_t, FloatTag> d8;
  const hn::Rebind<int16_t, FloatTag> d16;
  const hn::Rebind<hwy::float16_t, FloatTag> dh;
  const auto code = hn::PromoteTo(d16, hn::LoadU(d8, reinterpret_cast<const uint8_t*>(from)));
  const auto with_sign_twice = hn::ShiftRight<1>(hn::ShiftLeft<8>(code));
  const auto half = hn::And(with_sign_twice, hn::Set(d16, static_cast<int16_t>(0xbfff)));
  const FloatVec value = hn::PromoteTo(d, hn::BitCast(dh, half));
  // Only the two NaN codes give this magnitude.
  const auto is_nan = hn::Eq(hn::Abs(value), hn::Set(d, 480.0f / kLoadFactor<Float8E4M3>));
  return hn::IfThenElse(is_nan, hn::NaN(d), value);
}

// The first `count` < kLanes elements, zeros behind them; reads no further.
template <typename Element>
HWY_INLINE FloatVec LoadFirstFloats(const Element* from, size_t count) {
  Element padded[kVectorFloats] = {};
  std::memcpy(padded, from, count * sizeof(Element));
  return LoadFloats(padded);
}

// As many of `count` elements as a vector holds.
template <typename Element>
HWY_INLINE FloatVec LoadUpTo(const Element* from, size_t count) {
  return HWY_LIKELY(count >= kLanes) ? LoadFloats(from) : LoadFirstFloats(from, count);
}

HWY_INLINE void StoreFloats(FloatVec value, float* to) { hn::StoreU(value, FloatTag(), to); }

HWY_INLINE void StoreFloats(FloatVec value, BFloat16* to) {
  const hn::Rebind<uint16_t, FloatTag> d16;
  const hn::Rebind<int32_t, FloatTag> d32;
  const hn::Rebind<uint32_t, FloatTag> du32;
  const auto bits = hn::BitCast(du32, value);
  const auto upper = hn::ShiftRight<16>(bits);
  const auto is_odd = hn::And(upper, hn::Set(du32, 1u));
  const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(is_odd, hn::Set(du32, 0x7fffu))));
  const auto quiet_nan = hn::Or(upper, hn::Set(du32, 0x40u));
  const auto is_nan = hn::RebindMask(du32, hn::IsNaN(value));
  const auto chosen = hn::IfThenElse(is_nan, quiet_nan, rounded);
  hn::StoreU(hn::DemoteTo(d16, hn::BitCast(d32, chosen)), d16, reinterpret_cast<uint16_t*>(to));
}

template <typename Element>
HWY_INLINE void StoreUpTo(FloatVec value, Element* to, size_t count) {
  if (HWY_LIKELY(count >= kLanes)) {
    StoreFloats(value, to);
    return;
  }
  Element padded[kVectorFloats];
  StoreFloats(value, padded);
  std::memcpy(to, padded, count * sizeof(Element));
}

// The lanes of a vector in an order that only the target decides.
HWY_INLINE float SumOf(FloatVec value) { return hn::GetLane(hn::SumOfLanes(FloatTag(), value)); }

HWY_INLINE float LargestOf(FloatVec value) {
  return hn::GetLane(hn::MaxOfLanes(FloatTag(), value));
}

// exp for the whole line: 0 far below, infinity above, NaN stays NaN.
HWY_INLINE FloatVec Exp(FloatVec x) {
  const FloatTag d;
  const FloatVec result = hn::Exp(d, hn::Min(x, hn::Set(d, 104.0f)));
  return hn::IfThenElse(hn::IsNaN(x), x, result);
}

// Adds the products of kRows rows of x and kTileOutputs rows of w, `count` elements each, to sums:
// sums[row * kTileOutputs + output] holds one partial sum per lane, lane l the one of the elements
// l, l + kLanes, ... in this order. Every dot product in cpu/ is made here, whatever the tile.
// x is padded with zeros to whole vectors; w is not, and nothing behind it is read.
template <int kRows, typename Element>
HWY_INLINE void AddProducts(const float* HWY_RESTRICT x, size_t x_stride,
                            const Element* const* HWY_RESTRICT w, size_t count,
                            FloatVec* HWY_RESTRICT sums) {
  const Element* HWY_RESTRICT w0 = w[0];
  const Element* HWY_RESTRICT w1 = w[1];
  const Element* HWY_RESTRICT w2 = w[2];
  const Element* HWY_RESTRICT w3 = w[3];
  static_assert(kTileOutputs == 4);
  FloatVec s[kRows][kTileOutputs];
  HWY_UNROLL(8)
  for (int m = 0; m < kRows; ++m) {
    HWY_UNROLL(8)
    for (int n = 0; n < kTileOutputs; ++n) s[m][n] = sums[m * kTileOutputs + n];
  }
  size_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    const FloatVec v0 = LoadFloats(w0 + k);
    const FloatVec v1 = LoadFloats(w1 + k);
    const FloatVec v2 = LoadFloats(w2 + k);
    const FloatVec v3 = LoadFloats(w3 + k);
    HWY_UNROLL(8)
    for (int m = 0; m < kRows; ++m) {
      const FloatVec input = LoadFloats(x + m * x_stride + k);
      s[m][0] = hn::MulAdd(input, v0, s[m][0]);
      s[m][1] = hn::MulAdd(input, v1, s[m][1]);
      s[m][2] = hn::MulAdd(input, v2, s[m][2]);
      s[m][3] = hn::MulAdd(input, v3, s[m][3]);
    }
  }
  if (k < count) {
    const FloatVec v0 = LoadFirstFloats(w0 + k, count - k);
    const FloatVec v1 = LoadFirstFloats(w1 + k, count - k);
    const FloatVec v2 = LoadFirstFloats(w2 + k, count - k);
    const FloatVec v3 = LoadFirstFloats(w3 + k, count - k);
    HWY_UNROLL(8)
    for (int m = 0; m < kRows; ++m) {
      const FloatVec input = LoadFloats(x + m * x_stride + k);
      s[m][0] = hn::MulAdd(input, v0, s[m][0]);
      s[m][1] = hn::MulAdd(input, v1, s[m][1]);
      s[m][2] = hn::MulAdd(input, v2, s[m][2]);
      s[m][3] = hn::MulAdd(input, v3, s[m][3]);
    }
  }
  HWY_UNROLL(8)
  for (int m = 0; m < kRows; ++m) {
    HWY_UNROLL(8)
    for (int n = 0; n < kTileOutputs; ++n) sums[m * kTileOutputs + n] = s[m][n];
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace fathom
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
