#include <algorithm>
#include <cstdint>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/shape_checks.h"

namespace fathom {
namespace {

// A row of a weight and the factors of its blocks.
template <typename Element>
struct WeightRow {
  const Element* values;
  const float* scale_inv;  // F8_E4M3 only
  int column_offset;
};

template <typename Element>
WeightRow<Element> RowOfWeight(const Weight& weight, int64_t expert, int64_t row) {
  const int rank = weight.values.rank();
  const int64_t outputs = weight.values.dim(rank - 2);
  const int64_t inputs = weight.values.dim(rank - 1);
  WeightRow<Element> result = {
      .values = weight.values.data<Element>() + (expert * outputs + row) * inputs,
      .scale_inv = nullptr,
      .column_offset = weight.column_offset};
  if (weight.values.dtype() == DType::kF8E4M3) {
    const int64_t block_rows = weight.scale_inv.dim(rank - 2);
    const int64_t block_row = expert * block_rows + (row + weight.row_offset) / kFp8Block;
    result.scale_inv = weight.scale_inv.data<float>() + block_row * weight.scale_inv.dim(rank - 1);
  }
  return result;
}

template <typename Act, typename Element>
float Dot(const Act* x, const WeightRow<Element>& row, int64_t inputs) {
  float total = 0.0f;
  for (int64_t begin = 0; begin < inputs;) {
    const int64_t column = begin + row.column_offset;
    const int64_t end = row.scale_inv == nullptr
                            ? inputs
                            : std::min(inputs, begin + kFp8Block - column % kFp8Block);
    float sum = 0.0f;
    for (int64_t k = begin; k < end; ++k) sum += ToFloat(x[k]) * ToFloat(row.values[k]);
    total += row.scale_inv == nullptr ? sum : sum * row.scale_inv[column / kFp8Block];
    begin = end;
  }
  return total;
}

template <typename Fn>
void VisitWeight(DType dtype, Fn&& fn) {
  if (dtype == DType::kF8E4M3) {
    fn(Float8E4M3{});
  } else {
    VisitAct(dtype, fn);
  }
}

// Calls fn with the three element types: of x, of the weight, of out.
template <typename Fn>
void VisitLinear(const Tensor& x, const Tensor& values, const Tensor& out, Fn&& fn) {
  VisitAct(x.dtype(), [&](auto act) {
    VisitWeight(values.dtype(), [&](auto element) {
      VisitAct(out.dtype(), [&](auto result) { fn(act, element, result); });
    });
  });
}

}  // namespace

void CpuOps::Linear(const Tensor& x, const Weight& weight, const Tensor& out) {
  const LinearSizes sizes = CheckLinear(x, weight, out);
  VisitLinear(x, weight.values, out, [&](auto act, auto element, auto result) {
    threads_.ParallelFor(sizes.outputs, SmallestRange(sizes.inputs * sizes.rows),
                         [&](int64_t begin, int64_t end) {
                           for (int64_t n = begin; n < end; ++n) {
                             const auto row = RowOfWeight<decltype(element)>(weight, 0, n);
                             for (int64_t t = 0; t < sizes.rows; ++t) {
                               StoreFloat(Dot(RowOf<decltype(act)>(x, t), row, sizes.inputs),
                                          RowOf<decltype(result)>(out, t) + n);
                             }
                           }
                         });
  });
}

void CpuOps::HeadLinear(const Tensor& x, const Tensor& weight, const Tensor& out) {
  const LinearSizes sizes = CheckHeadLinear(x, weight, out);
  VisitLinear(x, weight, out, [&](auto act, auto element, auto result) {
    for (int64_t a = 0; a < sizes.experts; ++a) {
      for (int64_t n = 0; n < sizes.outputs; ++n) {
        const auto row = RowOfWeight<decltype(element)>({.values = weight}, a, n);
        for (int64_t t = 0; t < sizes.rows; ++t) {
          const auto* input = RowOf<decltype(act)>(x, t) + a * x.stride(1);
          StoreFloat(Dot(input, row, sizes.inputs),
                     RowOf<decltype(result)>(out, t) + a * out.stride(1) + n);
        }
      }
    }
  });
}

void CpuOps::GroupedLinear(const Tensor& x, const ExpertGroups& groups, const Weight& weight,
                           int num_experts_per_tok, const Tensor& out) {
  const LinearSizes sizes = CheckGroupedLinear(x, groups, weight, num_experts_per_tok, out);
  const bool by_token = num_experts_per_tok > 0 && x.dim(0) * num_experts_per_tok == sizes.rows;
  const auto* rows = groups.rows.data<int32_t>();
  const auto* offsets = groups.offsets.data<int32_t>();
  VisitLinear(x, weight.values, out, [&](auto act, auto element, auto result) {
    for (int64_t e = 0; e < sizes.experts; ++e) {
      for (int64_t n = 0; n < sizes.outputs; ++n) {
        const auto row = RowOfWeight<decltype(element)>(weight, e, n);
        for (int64_t i = offsets[e]; i < offsets[e + 1]; ++i) {
          const int64_t source = by_token ? rows[i] / num_experts_per_tok : i;
          StoreFloat(Dot(RowOf<decltype(act)>(x, source), row, sizes.inputs),
                     RowOf<decltype(result)>(out, i) + n);
        }
      }
    }
  });
}

}  // namespace fathom
