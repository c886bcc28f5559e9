#include <cstdint>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/shape_checks.h"

namespace fathom {

void CpuOps::StoreKv(const Tensor& latent, const Tensor& rope, const Tensor& places,
                     const Tensor& cache) {
  CheckStoreKv(latent, rope, places, cache);
  const int64_t num_places = cache.dim(0) * cache.dim(1);
  const int64_t kv_lora_rank = latent.dim(1);
  const int64_t rope_dim = rope.dim(1);

  VisitAct(latent.dtype(), [&](auto from) {
    VisitAct(cache.dtype(), [&](auto to) {
      for (int64_t t = 0; t < latent.dim(0); ++t) {
        const int64_t place = places.data<int32_t>()[t * places.stride(0)];
        CHECK(place >= 0 && place < num_places) << place << " of " << num_places;
        auto* target = cache.data<decltype(to)>() + place * cache.dim(2);
        const auto* latent_row = RowOf<decltype(from)>(latent, t);
        const auto* rope_row = RowOf<decltype(from)>(rope, t);
        for (int64_t i = 0; i < kv_lora_rank; ++i) StoreFloat(ToFloat(latent_row[i]), target++);
        for (int64_t i = 0; i < rope_dim; ++i) StoreFloat(ToFloat(rope_row[i]), target++);
      }
    });
  });
}

}  // namespace fathom
