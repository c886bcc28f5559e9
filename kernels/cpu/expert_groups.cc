#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/shape_checks.h"

namespace fathom {

void CpuOps::GroupByExpert(const Tensor& experts, int first_expert, const ExpertGroups& groups) {
  CheckGroupByExpert(experts, groups);
  const auto* choices = experts.data<int32_t>();
  auto* rows = groups.rows.data<int32_t>();
  auto* offsets = groups.offsets.data<int32_t>();
  const int64_t num_rows = experts.num_elements();
  const int64_t num_experts = groups.offsets.dim(0) - 1;
  const auto local_expert = [&](int64_t row) { return int64_t{choices[row]} - first_expert; };
  const auto is_local = [&](int64_t e) { return e >= 0 && e < num_experts; };

  // A counting sort, in which offsets[e + 1] first counts expert e, then says where it goes on.
  std::fill_n(offsets, num_experts + 1, 0);
  for (int64_t row = 0; row < num_rows; ++row) {
    if (is_local(local_expert(row))) ++offsets[local_expert(row) + 1];
  }
  int32_t begin = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int32_t count = offsets[e + 1];
    offsets[e + 1] = begin;
    begin += count;
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    if (is_local(local_expert(row))) {
      rows[offsets[local_expert(row) + 1]++] = static_cast<int32_t>(row);
    }
  }
}

void CpuOps::CombineExperts(const Tensor& y, const ExpertGroups& groups, const Tensor& weights,
                            const Tensor& out) {
  CheckCombineExperts(y, groups, weights, out);
  const auto* rows = groups.rows.data<int32_t>();
  const int64_t num_choices = weights.dim(1);
  const int64_t num_sorted = groups.offsets.data<int32_t>()[groups.offsets.dim(0) - 1];
  const int64_t hidden_size = out.dim(1);

  sorted_index_.assign(static_cast<size_t>(weights.num_elements()), -1);
  for (int64_t i = 0; i < num_sorted; ++i) sorted_index_[rows[i]] = static_cast<int32_t>(i);

  VisitAct(out.dtype(), [&](auto act) {
    using Act = decltype(act);
    const auto combine = [&](int64_t begin, int64_t end) {
      std::vector<float> sum(static_cast<size_t>(hidden_size));
      for (int64_t t = begin; t < end; ++t) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t j = 0; j < num_choices; ++j) {
          const int32_t i = sorted_index_[t * num_choices + j];
          if (i < 0) continue;
          const float share = RowOf<float>(weights, t)[j];
          const Act* row = RowOf<Act>(y, i);
          for (int64_t h = 0; h < hidden_size; ++h) sum[h] += share * ToFloat(row[h]);
        }
        Act* target = RowOf<Act>(out, t);
        for (int64_t h = 0; h < hidden_size; ++h) {
          StoreFloat(ToFloat(target[h]) + sum[h], target + h);
        }
      }
    };
    threads_.ParallelFor(out.dim(0), SmallestRange(hidden_size * num_choices), combine);
  });
}

}  // namespace fathom
