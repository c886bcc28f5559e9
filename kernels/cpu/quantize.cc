#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/shape_checks.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/quantize.cc"
#include "hwy/foreach_target.h"  // compiles this file once per target
#include "kernels/cpu/rows-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace fathom {
namespace HWY_NAMESPACE {

// Quantises rows [row_begin, row_end) × columns [column_begin, column_end), at most one block;
// returns its factor.
template <typename Element>
float QuantizeBlock(const Tensor& x, int64_t row_begin, int64_t row_end, int64_t column_begin,
                    int64_t column_end, const Tensor& values) {
  const auto count = static_cast<size_t>(column_end - column_begin);
  FloatVec most = hn::Zero(FloatTag());
  for (int64_t n = row_begin; n < row_end; ++n) {
    most = LargestMagnitudes(RowOf<Element>(x, n) + column_begin, count, most);
  }
  // A block of zeros, or of numbers so small that their factor would be zero, has factor 1.
  const float quotient = LargestOf(most) / kLargestE4M3;
  const float factor = quotient > 0.0f ? quotient : 1.0f;
  for (int64_t n = row_begin; n < row_end; ++n) {
    EncodeElements(RowOf<Element>(x, n) + column_begin, count, factor,
                   reinterpret_cast<uint8_t*>(RowOf<Float8E4M3>(values, n)) + column_begin);
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
