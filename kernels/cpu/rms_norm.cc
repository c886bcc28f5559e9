#include <cmath>
#include <cstddef>
#include <cstdint>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/shape_checks.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rms_norm.cc"
#include "hwy/foreach_target.h"  // compiles this file once per target
#include "kernels/cpu/vector-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace fathom {
namespace HWY_NAMESPACE {

// Four sums, so that one addition need not wait for the other.
template <typename Act>
float SumOfSquares(const Act* row, size_t size) {
  constexpr size_t kSums = 4;
  FloatVec sums[kSums];
  for (FloatVec& sum : sums) sum = hn::Zero(FloatTag());
  for (size_t i = 0; i < size; i += kSums * kLanes) {
    HWY_UNROLL(4)
    for (size_t j = 0; j < kSums; ++j) {
      const size_t begin = i + j * kLanes;
      if (begin >= size) break;
      const FloatVec x = LoadUpTo(row + begin, size - begin);
      sums[j] = hn::MulAdd(x, x, sums[j]);
    }
  }
  return SumOf(hn::Add(hn::Add(sums[0], sums[1]), hn::Add(sums[2], sums[3])));
}

template <typename Act, typename Gain>
void NormalizeRow(const Act* row, const Gain* gain, size_t size, float eps, Act* out) {
  const float mean = SumOfSquares(row, size) / static_cast<float>(size);
  const FloatVec factor = hn::Set(FloatTag(), 1.0f / std::sqrt(mean + eps));
  for (size_t i = 0; i < size; i += kLanes) {
    const FloatVec normal = hn::Mul(LoadUpTo(row + i, size - i), factor);
    StoreUpTo(hn::Mul(normal, LoadUpTo(gain + i, size - i)), out + i, size - i);
  }
}

void NormalizeRows(const Tensor& x, const Tensor& weight, float eps, const Tensor& out,
                   int64_t begin, int64_t end) {
  const auto size = static_cast<size_t>(x.dim(1));
  VisitAct(x.dtype(), [&](auto act) {
    VisitAct(weight.dtype(), [&](auto gain) {
      using Act = decltype(act);
      for (int64_t t = begin; t < end; ++t) {
        NormalizeRow(RowOf<Act>(x, t), weight.data<decltype(gain)>(), size, eps,
                     RowOf<Act>(out, t));
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

HWY_EXPORT(NormalizeRows);

}  // namespace

void CpuOps::RmsNorm(const Tensor& x, const Tensor& weight, float eps, const Tensor& out) {
  CheckRmsNorm(x, weight, out);
  threads_.ParallelFor(x.dim(0), SmallestRange(x.dim(1)), [&](int, int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(NormalizeRows)(x, weight, eps, out, begin, end);
  });
}

}  // namespace fathom
#endif  // HWY_ONCE
