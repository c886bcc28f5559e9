#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/shape_checks.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/activation.cc"
#include "hwy/foreach_target.h"  // compiles this file once per target
#include "kernels/cpu/vector-inl.h"
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

template <typename Act>
void AddRow(Act* x, const Act* y, size_t size) {
  for (size_t i = 0; i < size; i += kLanes) {
    const FloatVec sum = hn::Add(LoadUpTo(x + i, size - i), LoadUpTo(y + i, size - i));
    StoreUpTo(sum, x + i, size - i);
  }
}

void SwiGluRows(const Tensor& gate_up, const Tensor& out, int64_t begin, int64_t end) {
  VisitAct(out.dtype(), [&](auto act) {
    using Act = decltype(act);
    for (int64_t t = begin; t < end; ++t) {
      SwiGluRow(RowOf<Act>(gate_up, t), static_cast<size_t>(out.dim(1)), RowOf<Act>(out, t));
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

void CpuOps::SwiGlu(const Tensor& gate_up, const Tensor& out) {
  CheckSwiGlu(gate_up, out);
  const int64_t smallest_range = SmallestRange(4 * out.dim(1));
  threads_.ParallelFor(out.dim(0), smallest_range, [&](int, int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(SwiGluRows)(gate_up, out, begin, end);
  });
}

void CpuOps::Clear(const Tensor& out) {
  CheckClear(out);
  const auto row_bytes = static_cast<size_t>(out.dim(1) * SizeOf(out.dtype()));
  for (int64_t t = 0; t < out.dim(0); ++t) {
    std::memset(static_cast<char*>(out.raw()) + t * out.stride(0) * SizeOf(out.dtype()), 0,
                row_bytes);
  }
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
