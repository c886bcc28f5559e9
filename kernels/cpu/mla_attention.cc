#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/shape_checks.h"

namespace fathom {

void CpuOps::MlaAttention(const Tensor& q_latent, const Tensor& q_rope, const Tensor& cache,
                          const AttentionBatch& batch, float scale, const Tensor& out) {
  const AttentionSizes sizes = CheckMlaAttention(q_latent, q_rope, cache, batch, out);
  const auto* query_start = batch.query_start.data<int32_t>();
  const auto* context_lens = batch.context_lens.data<int32_t>();
  std::vector<float> scores;
  std::vector<float> sum(static_cast<size_t>(sizes.kv_lora_rank));

  VisitAct(q_latent.dtype(), [&](auto act) {
    VisitAct(cache.dtype(), [&](auto stored) {
      using Act = decltype(act);
      using Stored = decltype(stored);
      for (int64_t s = 0; s < sizes.sequences; ++s) {
        const int32_t* table = RowOf<int32_t>(batch.block_tables, s);
        const auto kv_row = [&](int64_t position) {
          const int64_t place = int64_t{table[position / batch.block_size]} * batch.block_size +
                                position % batch.block_size;
          return cache.data<Stored>() + place * cache.dim(2);
        };
        for (int64_t t = query_start[s]; t < query_start[s + 1]; ++t) {
          const int64_t context = context_lens[s] - (query_start[s + 1] - 1 - t);
          for (int64_t a = 0; a < sizes.heads; ++a) {
            const Act* latent = RowOf<Act>(q_latent, t) + a * q_latent.stride(1);
            const Act* rope = RowOf<Act>(q_rope, t) + a * q_rope.stride(1);
            scores.assign(static_cast<size_t>(context), 0.0f);
            float largest = -std::numeric_limits<float>::infinity();
            for (int64_t p = 0; p < context; ++p) {
              const Stored* kv = kv_row(p);
              float dot = 0.0f;
              for (int64_t i = 0; i < sizes.kv_lora_rank; ++i) {
                dot += ToFloat(latent[i]) * ToFloat(kv[i]);
              }
              for (int64_t i = 0; i < sizes.rope_dim; ++i) {
                dot += ToFloat(rope[i]) * ToFloat(kv[sizes.kv_lora_rank + i]);
              }
              scores[p] = dot * scale;
              largest = std::max(largest, scores[p]);
            }
            float total = 0.0f;
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (int64_t p = 0; p < context; ++p) {
              const float share = std::exp(scores[p] - largest);
              total += share;
              const Stored* kv = kv_row(p);
              for (int64_t i = 0; i < sizes.kv_lora_rank; ++i) sum[i] += share * ToFloat(kv[i]);
            }
            Act* target = RowOf<Act>(out, t) + a * out.stride(1);
            for (int64_t i = 0; i < sizes.kv_lora_rank; ++i) {
              StoreFloat(sum[i] / total, target + i);
            }
          }
        }
      }
    });
  });
}

}  // namespace fathom
