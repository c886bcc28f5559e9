#include <cstddef>
#include <cstdint>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/row_tasks.h"
#include "kernels/shape_checks.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rms_norm.cc"
#include "hwy/foreach_target.h"  // compiles this file once per target
#include "kernels/cpu/rows-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace fathom {
namespace HWY_NAMESPACE {

// `spare` has room for a row: what is quantised was rounded to act, even where nobody else wants
// it.
void AddAndNormalizeRows(const AddRmsNormTask& task, void* spare, int64_t begin, int64_t end) {
  const auto size = static_cast<size_t>(task.x.dim(1));
  VisitAct(task.x.dtype(), [&](auto act) {
    VisitAct(task.weight.dtype(), [&](auto gain) {
      using Act = decltype(act);
      for (int64_t t = begin; t < end; ++t) {
        Act* x = RowOf<Act>(task.x, t);
        if (task.y.present()) AddRow(x, RowOf<Act>(task.y, t), size);
        Act* normed = task.normed.present() ? RowOf<Act>(task.normed, t) : static_cast<Act*>(spare);
        NormalizeRow(x, task.weight.data<decltype(gain)>(), size, task.eps, normed);
        if (task.quantized.present()) QuantizeRow(normed, task.quantized, t);
      }
    });
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace fathom
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fathom {
namespace {

HWY_EXPORT(AddAndNormalizeRows);

}  // namespace

void CpuOps::AddRmsNorm(const Tensor& x, const Tensor& y, const Tensor& weight, float eps,
                        const Tensor& normed, const LinearInput& quantized) {
  CheckAddRmsNorm(x, y, weight, normed, quantized);
  const AddRmsNormTask task = {x, y, weight, eps, normed, quantized};
  const int64_t size = x.dim(1);
  threads_.ParallelFor(x.dim(0), SmallestRange(size), [&](int range, int64_t begin, int64_t end) {
    Scratch& scratch = scratch_[static_cast<size_t>(range)];
    scratch.Reset(PadToVector(static_cast<size_t>(size)));
    HWY_DYNAMIC_DISPATCH(AddAndNormalizeRows)
    (task, scratch.Take(static_cast<size_t>(size)), begin, end);
  });
}

}  // namespace fathom
#endif  // HWY_ONCE
