#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/shape_checks.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/activation.cc"
#include "hwy/foreach_target.h"  // compiles this file once per target
#include "kernels/cpu/rows-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace fathom {
namespace HWY_NAMESPACE {

template <typename Act>
void SwiGluRow(const Act* gate_up, size_t size, Act* out) {
  const FloatVec one = hn::Set(FloatTag(), 1.0f);
  for (size_t i = 0; i < size; i += kLanes) {
    const FloatVec gate = LoadUpTo(gate_up + i, size - i);
    const FloatVec up = LoadUpTo(gate_up + size + i, size - i);
    const FloatVec silu = hn::Div(gate, hn::Add(one, Exp(hn::Neg(gate))));
    StoreUpTo(hn::Mul(silu, up), out + i, size - i);
  }
}

// `spare` has room for a row of out: what is quantised was rounded to act.
void SwiGluRows(const Tensor& gate_up, const LinearInput& out, void* spare, int64_t begin,
                int64_t end) {
  const auto size = static_cast<size_t>(out.values.dim(1));
  VisitAct(gate_up.dtype(), [&](auto act) {
    using Act = decltype(act);
    for (int64_t t = begin; t < end; ++t) {
      Act* row = out.quantized() ? static_cast<Act*>(spare) : RowOf<Act>(out.values, t);
      SwiGluRow(RowOf<Act>(gate_up, t), size, row);
      if (out.quantized()) QuantizeRow(row, out, t);
    }
  });
}

void AddRows(const Tensor& x, const Tensor& y, int64_t begin, int64_t end) {
  VisitAct(x.dtype(), [&](auto act) {
    using Act = decltype(act);
    for (int64_t t = begin; t < end; ++t) {
      AddRow(RowOf<Act>(x, t), RowOf<Act>(y, t), static_cast<size_t>(x.dim(1)));
    }
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace fathom
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fathom {
namespace {

HWY_EXPORT(SwiGluRows);
HWY_EXPORT(AddRows);

}  // namespace

void CpuOps::SwiGlu(const Tensor& gate_up, const ExpertGroups* groups, const LinearInput& out) {
  CheckSwiGlu(gate_up, groups, out);
  const int64_t num_rows =
      groups == nullptr ? gate_up.dim(0)
                        : int64_t{groups->offsets.data<int32_t>()[groups->offsets.dim(0) - 1]};
  const int64_t size = out.values.dim(1);
  threads_.ParallelFor(num_rows, SmallestRange(4 * size),
                       [&](int range, int64_t begin, int64_t end) {
                         Scratch& scratch = scratch_[static_cast<size_t>(range)];
                         scratch.Reset(PadToVector(static_cast<size_t>(size)));
                         HWY_DYNAMIC_DISPATCH(SwiGluRows)
                         (gate_up, out, scratch.Take(static_cast<size_t>(size)), begin, end);
                       });
}

void CpuOps::Add(const Tensor& x, const Tensor& y) {
  CheckAdd(x, y);
  threads_.ParallelFor(x.dim(0), SmallestRange(x.dim(1)), [&](int, int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(AddRows)(x, y, begin, end);
  });
}

void CpuOps::GatherRows(const Tensor& x, const Tensor& rows, const Tensor& out) {
  CheckGatherRows(x, rows, out);
  const int64_t element_bytes = SizeOf(x.dtype());
  const auto row_bytes = static_cast<size_t>(x.dim(1) * element_bytes);
  for (int64_t r = 0; r < rows.dim(0); ++r) {
    const int64_t row = rows.data<int32_t>()[r * rows.stride(0)];
    CHECK(row >= 0 && row < x.dim(0)) << row << " of " << x.DebugString();
    std::memcpy(static_cast<char*>(out.raw()) + r * out.stride(0) * element_bytes,
                static_cast<const char*>(x.raw()) + row * x.stride(0) * element_bytes, row_bytes);
  }
}

}  // namespace fathom
#endif  // HWY_ONCE
