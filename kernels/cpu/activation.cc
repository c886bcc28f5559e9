#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/shape_checks.h"

namespace fathom {

void CpuOps::SwiGlu(const Tensor& gate_up, const Tensor& out) {
  CheckSwiGlu(gate_up, out);
  const int64_t size = out.dim(1);
  VisitAct(out.dtype(), [&](auto act) {
    using Act = decltype(act);
    threads_.ParallelFor(out.dim(0), SmallestRange(size * 8), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const Act* gate = RowOf<Act>(gate_up, t);
        const Act* up = gate + size;
        Act* target = RowOf<Act>(out, t);
        for (int64_t i = 0; i < size; ++i) {
          const float g = ToFloat(gate[i]);
          StoreFloat(g / (1.0f + std::exp(-g)) * ToFloat(up[i]), target + i);
        }
      }
    });
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
  const int64_t size = x.dim(1);
  VisitAct(x.dtype(), [&](auto act) {
    using Act = decltype(act);
    threads_.ParallelFor(x.dim(0), SmallestRange(size), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        Act* target = RowOf<Act>(x, t);
        const Act* row = RowOf<Act>(y, t);
        for (int64_t i = 0; i < size; ++i) {
          StoreFloat(ToFloat(target[i]) + ToFloat(row[i]), target + i);
        }
      }
    });
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
