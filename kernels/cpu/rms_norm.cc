#include <cmath>
#include <cstdint>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/shape_checks.h"

namespace fathom {

void CpuOps::RmsNorm(const Tensor& x, const Tensor& weight, float eps, const Tensor& out) {
  CheckRmsNorm(x, weight, out);
  const int64_t size = x.dim(1);

  VisitAct(x.dtype(), [&](auto act) {
    VisitAct(weight.dtype(), [&](auto weight_element) {
      using Act = decltype(act);
      const auto* gain = weight.data<decltype(weight_element)>();
      threads_.ParallelFor(x.dim(0), SmallestRange(size), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const Act* row = RowOf<Act>(x, t);
          Act* target = RowOf<Act>(out, t);
          float sum = 0.0f;
          for (int64_t i = 0; i < size; ++i) sum += ToFloat(row[i]) * ToFloat(row[i]);
          const float factor = 1.0f / std::sqrt(sum / static_cast<float>(size) + eps);
          for (int64_t i = 0; i < size; ++i) {
            StoreFloat(ToFloat(row[i]) * factor * ToFloat(gain[i]), target + i);
          }
        }
      });
    });
  });
}

}  // namespace fathom
