#include <cstdint>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/shape_checks.h"

namespace fathom {

void CpuOps::RotaryEmbed(const Tensor& x, const Tensor& positions, const Tensor& cos_sin) {
  CheckRotaryEmbed(x, positions, cos_sin);
  const int64_t num_heads = x.dim(1);
  const int64_t rope_dim = x.dim(2);

  VisitAct(x.dtype(), [&](auto act) {
    using Act = decltype(act);
    const auto rotate = [&](int, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t position = positions.data<int32_t>()[t * positions.stride(0)];
        CHECK(position >= 0 && position < cos_sin.dim(0)) << position;
        const float* turn = RowOf<float>(cos_sin, position);
        for (int64_t a = 0; a < num_heads; ++a) {
          Act* head = RowOf<Act>(x, t) + a * x.stride(1);
          for (int64_t i = 0; i < rope_dim; i += 2) {
            const float even = ToFloat(head[i]);
            const float odd = ToFloat(head[i + 1]);
            StoreFloat(even * turn[i] - odd * turn[i + 1], head + i);
            StoreFloat(even * turn[i + 1] + odd * turn[i], head + i + 1);
          }
        }
      }
    };
    threads_.ParallelFor(x.dim(0), SmallestRange(num_heads * rope_dim), rotate);
  });
}

}  // namespace fathom
