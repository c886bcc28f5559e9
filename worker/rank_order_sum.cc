#include "worker/rank_order_sum.h"

#include <algorithm>

#include "base/check.h"
#include "kernels/number_formats.h"

namespace fathom {
namespace {

constexpr int64_t kBlock = 1024;  // sums of a block stay in the nearest cache

template <typename T>
void Sum(absl::Span<const void* const> parts, int64_t count, T* out) {
  float sums[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t length = std::min(kBlock, count - begin);
    const T* first = static_cast<const T*>(parts[0]) + begin;
    for (int64_t i = 0; i < length; ++i) sums[i] = ToFloat(first[i]);
    for (size_t rank = 1; rank < parts.size(); ++rank) {
      const T* part = static_cast<const T*>(parts[rank]) + begin;
      for (int64_t i = 0; i < length; ++i) sums[i] += ToFloat(part[i]);
    }
    for (int64_t i = 0; i < length; ++i) StoreFloat(sums[i], out + begin + i);
  }
}

}  // namespace

void SumInRankOrder(absl::Span<const void* const> parts, DType dtype, int64_t count, void* out) {
  CHECK(!parts.empty());
  CHECK(dtype == DType::kF32 || dtype == DType::kBF16) << NameOf(dtype);
  if (dtype == DType::kF32) {
    Sum(parts, count, static_cast<float*>(out));
  } else {
    Sum(parts, count, static_cast<BFloat16*>(out));
  }
}

}  // namespace fathom
