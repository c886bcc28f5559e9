#include <cstdint>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/random_bits.h"
#include "kernels/shape_checks.h"

namespace fathom {
namespace {

template <typename Element>
void FillElements(Element* elements, float amplitude, uint64_t seed, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    StoreFloat(amplitude * RandomUnit(seed, static_cast<uint64_t>(i)), elements + i);
  }
}

}  // namespace

void CpuOps::FillRandom(const Tensor& out, float amplitude, uint64_t seed) {
  CheckFillRandom(out);
  threads_.ParallelFor(out.num_elements(), SmallestRange(0), [&](int, int64_t begin, int64_t end) {
    if (out.dtype() == DType::kF8E4M3) {
      auto* codes = out.data<Float8E4M3>();
      for (int64_t i = begin; i < end; ++i) {
        codes[i] = RandomE4M3(seed, static_cast<uint64_t>(i));
      }
    } else {
      VisitAct(out.dtype(), [&](auto act) {
        FillElements(out.data<decltype(act)>(), amplitude, seed, begin, end);
      });
    }
  });
}

}  // namespace fathom
