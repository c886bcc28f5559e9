#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/shape_checks.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/expert_groups.cc"
#include "hwy/foreach_target.h"  // compiles this file once per target
#include "kernels/cpu/vector-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace fathom {
namespace HWY_NAMESPACE {

// out = Σ shares[j] * y[places[j]], plus out if accumulate; a place of -1 is another rank's.
template <typename Act>
void CombineRow(const Tensor& y, const int32_t* places, const float* shares, int64_t num_choices,
                bool accumulate, Act* out) {
  const FloatTag d;
  const auto size = static_cast<size_t>(y.dim(1));
  for (size_t i = 0; i < size; i += kLanes) {
    FloatVec sum = hn::Zero(d);
    for (int64_t j = 0; j < num_choices; ++j) {
      if (places[j] < 0) continue;
      const Act* row = RowOf<Act>(y, places[j]);
      sum = hn::MulAdd(hn::Set(d, shares[j]), LoadUpTo(row + i, size - i), sum);
    }
    if (accumulate) sum = hn::Add(LoadUpTo(out + i, size - i), sum);
    StoreUpTo(sum, out + i, size - i);
  }
}

void CombineRows(const Tensor& y, const int32_t* places, const Tensor& weights, bool accumulate,
                 const Tensor& out, int64_t begin, int64_t end) {
  const int64_t num_choices = weights.dim(1);
  VisitAct(out.dtype(), [&](auto act) {
    using Act = decltype(act);
    for (int64_t t = begin; t < end; ++t) {
      CombineRow(y, places + t * num_choices, RowOf<float>(weights, t), num_choices, accumulate,
                 RowOf<Act>(out, t));
    }
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace fathom
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fathom {
namespace {

HWY_EXPORT(CombineRows);

}  // namespace

void CpuOps::GroupByExpert(const Tensor& experts, int first_expert, const ExpertGroups& groups) {
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

void CpuOps::CombineExperts(const Tensor& y, const Routes& routes, bool accumulate,
                            const Tensor& out) {
  CheckCombineExperts(y, routes, out);
  const Tensor& weights = routes.weights;
  const ExpertGroups& groups = routes.groups;
  const auto* rows = groups.rows.data<int32_t>();
  const int64_t num_sorted = groups.offsets.data<int32_t>()[groups.offsets.dim(0) - 1];
  places_.assign(static_cast<size_t>(weights.num_elements()), -1);
  for (int64_t i = 0; i < num_sorted; ++i) places_[rows[i]] = static_cast<int32_t>(i);

  const int64_t smallest_range = SmallestRange(out.dim(1) * weights.dim(1));
  threads_.ParallelFor(out.dim(0), smallest_range, [&](int, int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(CombineRows)(y, places_.data(), weights, accumulate, out, begin, end);
  });
}

}  // namespace fathom
#endif  // HWY_ONCE
