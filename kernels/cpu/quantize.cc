#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/shape_checks.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/quantize.cc"
#include "hwy/foreach_target.h"  // compiles this file once per target
#include "kernels/cpu/vector-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace fathom {
namespace HWY_NAMESPACE {

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

// Quantises rows [row_begin, row_end) × columns [column_begin, column_end), at most one block;
// returns its factor.
template <typename Element>
float QuantizeBlock(const Tensor& x, int64_t row_begin, int64_t row_end, int64_t column_begin,
                    int64_t column_end, const Tensor& values) {
  const FloatTag d;
  const hn::Rebind<uint8_t, FloatTag> d8;
  const auto count = static_cast<size_t>(column_end - column_begin);
  FloatVec most = hn::Zero(d);
  for (int64_t n = row_begin; n < row_end; ++n) {
    const Element* row = RowOf<Element>(x, n) + column_begin;
    for (size_t k = 0; k < count; k += kLanes) {
      const FloatVec magnitude = hn::Abs(LoadUpTo(row + k, count - k));
      most = hn::Max(most, hn::IfThenZeroElse(hn::IsNaN(magnitude), magnitude));
    }
  }
  // A block of zeros, or of numbers so small that their factor would be zero, has factor 1.
  const float quotient = LargestOf(most) / kLargestE4M3;
  const float factor = quotient > 0.0f ? quotient : 1.0f;
  const FloatVec divisor = hn::Set(d, factor);
  for (int64_t n = row_begin; n < row_end; ++n) {
    const Element* row = RowOf<Element>(x, n) + column_begin;
    auto* codes = reinterpret_cast<uint8_t*>(RowOf<Float8E4M3>(values, n)) + column_begin;
    for (size_t k = 0; k < count; k += kLanes) {
      uint8_t encoded[kVectorFloats];
      hn::StoreU(hn::DemoteTo(d8, EncodeE4M3(hn::Div(LoadUpTo(row + k, count - k), divisor))), d8,
                 encoded);
      std::copy_n(encoded, std::min(kLanes, count - k), codes + k);
    }
  }
  return factor;
}

// Rows of blocks [begin, end).
void QuantizeBlockRows(const Tensor& x, const Weight& out, int64_t begin, int64_t end) {
  VisitAct(x.dtype(), [&](auto from) {
    for (int64_t block_row = begin; block_row < end; ++block_row) {
      float* factors = RowOf<float>(out.scale_inv, block_row);
      const int64_t row_begin = block_row * kFp8Block;
      const int64_t row_end = std::min(x.dim(0), row_begin + kFp8Block);
      for (int64_t k = 0; k < x.dim(1); k += kFp8Block) {
        factors[k / kFp8Block] = QuantizeBlock<decltype(from)>(
            x, row_begin, row_end, k, std::min(x.dim(1), k + kFp8Block), out.values);
      }
    }
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace fathom
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fathom {
namespace {

HWY_EXPORT(QuantizeBlockRows);

template <typename From, typename To>
void CopyRow(const From* from, int64_t count, To* to) {
  for (int64_t k = 0; k < count; ++k) StoreFloat(ToFloat(from[k]), to + k);
}

template <typename To>
void DequantizeRow(const Weight& weight, int64_t n, To* to) {
  const Float8E4M3* codes = RowOf<Float8E4M3>(weight.values, n);
  const float* factors = RowOf<float>(weight.scale_inv, (n + weight.row_offset) / kFp8Block);
  for (int64_t k = 0; k < weight.values.dim(1); ++k) {
    StoreFloat(ToFloat(codes[k]) * factors[(k + weight.column_offset) / kFp8Block], to + k);
  }
}

}  // namespace

void CpuOps::Dequantize(const Weight& weight, const Tensor& out) {
  CheckDequantize(weight, out);
  const int64_t columns = out.dim(1);
  VisitAct(out.dtype(), [&](auto to) {
    using To = decltype(to);
    threads_.ParallelFor(out.dim(0), SmallestRange(columns), [&](int, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        if (weight.values.dtype() == DType::kF8E4M3) {
          DequantizeRow(weight, n, RowOf<To>(out, n));
        } else {
          VisitAct(weight.values.dtype(), [&](auto from) {
            CopyRow(RowOf<decltype(from)>(weight.values, n), columns, RowOf<To>(out, n));
          });
        }
      }
    });
  });
}

void CpuOps::QuantizeFp8(const Tensor& x, const Weight& out) {
  CheckQuantizeFp8(x, out);
  const int64_t block_rows = (x.dim(0) + kFp8Block - 1) / kFp8Block;
  threads_.ParallelFor(block_rows, 1, [&](int, int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(QuantizeBlockRows)(x, out, begin, end);
  });
}

}  // namespace fathom
#endif  // HWY_ONCE
