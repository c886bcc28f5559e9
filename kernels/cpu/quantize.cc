#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/shape_checks.h"

namespace fathom {
namespace {

// Quantises rows [row_begin, row_end) × columns [column_begin, column_end), at most one block;
// returns its factor.
template <typename Element>
float QuantizeBlock(const Tensor& x, int64_t row_begin, int64_t row_end, int64_t column_begin,
                    int64_t column_end, const Tensor& values) {
  float largest = 0.0f;
  for (int64_t n = row_begin; n < row_end; ++n) {
    const Element* row = RowOf<Element>(x, n);
    for (int64_t k = column_begin; k < column_end; ++k) {
      largest = std::max(largest, std::fabs(ToFloat(row[k])));
    }
  }
  // A block of zeros, or of numbers so small that their factor would be zero.
  const float factor = largest / kLargestE4M3 > 0.0f ? largest / kLargestE4M3 : 1.0f;
  for (int64_t n = row_begin; n < row_end; ++n) {
    const Element* row = RowOf<Element>(x, n);
    Float8E4M3* codes = RowOf<Float8E4M3>(values, n);
    for (int64_t k = column_begin; k < column_end; ++k) {
      codes[k] = ToFloat8E4M3(ToFloat(row[k]) / factor);
    }
  }
  return factor;
}

}  // namespace

void CpuOps::Dequantize(const Weight& weight, const Tensor& out) {
  CheckDequantize(weight, out);
  const int64_t columns = out.dim(1);
  VisitAct(out.dtype(), [&](auto to) {
    using To = decltype(to);
    threads_.ParallelFor(out.dim(0), SmallestRange(columns), [&](int, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        To* target = RowOf<To>(out, n);
        if (weight.values.dtype() == DType::kF8E4M3) {
          const Float8E4M3* codes = RowOf<Float8E4M3>(weight.values, n);
          const float* factors =
              RowOf<float>(weight.scale_inv, (n + weight.row_offset) / kFp8Block);
          for (int64_t k = 0; k < columns; ++k) {
            const float factor = factors[(k + weight.column_offset) / kFp8Block];
            StoreFloat(ToFloat(codes[k]) * factor, target + k);
          }
        } else {
          VisitAct(weight.values.dtype(), [&](auto from) {
            const auto* row = RowOf<decltype(from)>(weight.values, n);
            for (int64_t k = 0; k < columns; ++k) StoreFloat(ToFloat(row[k]), target + k);
          });
        }
      }
    });
  });
}

void CpuOps::QuantizeFp8(const Tensor& x, const Weight& out) {
  CheckQuantizeFp8(x, out);
  const int64_t rows = x.dim(0);
  const int64_t columns = x.dim(1);
  const int64_t block_rows = (rows + kFp8Block - 1) / kFp8Block;
  VisitAct(x.dtype(), [&](auto from) {
    threads_.ParallelFor(block_rows, 1, [&](int, int64_t begin, int64_t end) {
      for (int64_t block_row = begin; block_row < end; ++block_row) {
        float* factors = RowOf<float>(out.scale_inv, block_row);
        const int64_t row_begin = block_row * kFp8Block;
        const int64_t row_end = std::min(rows, row_begin + kFp8Block);
        for (int64_t k = 0; k < columns; k += kFp8Block) {
          factors[k / kFp8Block] = QuantizeBlock<decltype(from)>(
              x, row_begin, row_end, k, std::min(columns, k + kFp8Block), out.values);
        }
      }
    });
  });
}

}  // namespace fathom
