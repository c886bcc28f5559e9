#include <algorithm>
#include <cstdint>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/shape_checks.h"

namespace fathom {

void CpuOps::Embed(const Tensor& token_ids, const Tensor& table, int first_row, const Tensor& out) {
  CheckEmbed(token_ids, table, out);
  const auto* ids = token_ids.data<int32_t>();
  const int64_t hidden_size = table.dim(1);
  const int64_t num_rows = table.dim(0);

  VisitAct(table.dtype(), [&](auto from) {
    VisitAct(out.dtype(), [&](auto to) {
      const auto copy_rows = [&](int, int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const int64_t row = int64_t{ids[t * token_ids.stride(0)]} - first_row;
          auto* target = RowOf<decltype(to)>(out, t);
          if (row < 0 || row >= num_rows) {
            std::fill_n(target, hidden_size, decltype(to){});
            continue;
          }
          const auto* source = RowOf<decltype(from)>(table, row);
          for (int64_t i = 0; i < hidden_size; ++i) StoreFloat(ToFloat(source[i]), target + i);
        }
      };
      threads_.ParallelFor(out.dim(0), SmallestRange(hidden_size), copy_rows);
    });
  });
}

}  // namespace fathom
