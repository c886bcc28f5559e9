#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/row_tasks.h"
#include "kernels/shape_checks.h"

// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/store_latents.cc"
#include "hwy/foreach_target.h"  // compiles this file once per target
#include "kernels/cpu/rows-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace fathom {
namespace HWY_NAMESPACE {

// Both parts as they are, in the cache's type.
template <typename Act, typename Stored>
void StorePlace(const Act* latent, int64_t kv_lora_rank, const Act* key, int64_t rope_dim,
                Stored* place) {
  for (int64_t i = 0; i < kv_lora_rank; ++i) StoreFloat(ToFloat(latent[i]), place++);
  for (int64_t i = 0; i < rope_dim; ++i) StoreFloat(ToFloat(key[i]), place++);
}

// codes | factors | key; a factor may stand at any byte.
template <typename Act>
void StorePlace(const Act* latent, int64_t kv_lora_rank, const Act* key, int64_t rope_dim,
                Float8E4M3* place) {
  auto* codes = reinterpret_cast<uint8_t*>(place);
  uint8_t* factors = codes + kv_lora_rank;
  QuantizeRow(latent, static_cast<size_t>(kv_lora_rank), codes, [factors](size_t group, float f) {
    std::memcpy(factors + group * sizeof f, &f, sizeof f);
  });
  uint8_t* stored_key = factors + (kv_lora_rank + kFp8Block - 1) / kFp8Block * 4;
  for (int64_t i = 0; i < rope_dim; ++i) {
    const BFloat16 element = ToBFloat16(ToFloat(key[i]));
    std::memcpy(stored_key + i * 2, &element, 2);
  }
}

template <typename Act, typename Stored>
void StoreRow(const StoreLatentsTask& task, int64_t t, void* spare) {
  const int64_t kv_lora_rank = task.latent.dim(1);
  const int64_t rope_dim = task.key.dim(1);
  auto* row = static_cast<Act*>(spare);
  if (task.q_a.present()) {
    const bool is_quantized = task.q_a_out.quantized();
    Act* normed = is_quantized ? row : RowOf<Act>(task.q_a_out.values, t);
    NormalizeRow(RowOf<Act>(task.q_a, t), task.q_norm.data<float>(),
                 static_cast<size_t>(task.q_a.dim(1)), task.eps, normed);
    if (is_quantized) QuantizeRow(normed, task.q_a_out, t);
  }

  const int64_t position = task.positions.data<int32_t>()[t * task.positions.stride(0)];
  CHECK(position >= 0 && position < task.cos_sin.dim(0)) << position;
  const int64_t place = task.places.data<int32_t>()[t * task.places.stride(0)];
  const int64_t num_places = task.cache.dim(0) * task.cache.dim(1);
  CHECK(place >= 0 && place < num_places) << place << " of " << num_places;
  Act* key = row + kv_lora_rank;
  NormalizeRow(RowOf<Act>(task.latent, t), task.kv_norm.data<float>(),
               static_cast<size_t>(kv_lora_rank), task.eps, row);
  RotateRow(RowOf<Act>(task.key, t), RowOf<float>(task.cos_sin, position), rope_dim, key);
  StorePlace(row, kv_lora_rank, key, rope_dim,
             task.cache.data<Stored>() + place * task.cache.dim(2));
}

void StoreRows(const StoreLatentsTask& task, void* spare, int64_t begin, int64_t end) {
  VisitAct(task.latent.dtype(), [&](auto act) {
    using Act = decltype(act);
    for (int64_t t = begin; t < end; ++t) {
      switch (task.cache.dtype()) {
        case DType::kF32:
          StoreRow<Act, float>(task, t, spare);
          break;
        case DType::kBF16:
          StoreRow<Act, BFloat16>(task, t, spare);
          break;
        default:
          StoreRow<Act, Float8E4M3>(task, t, spare);
      }
    }
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace fathom
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fathom {
namespace {

HWY_EXPORT(StoreRows);

}  // namespace

void CpuOps::StoreLatents(const Tensor& qkv_a, const Tensor& q_norm, const Tensor& kv_norm,
                          float eps, const Tensor& positions, const Tensor& cos_sin,
                          const Tensor& places, const LinearInput& q_a, const Tensor& cache) {
  const LatentSizes sizes =
      CheckStoreLatents(qkv_a, q_norm, kv_norm, positions, cos_sin, places, q_a, cache);
  const int64_t latent_end = sizes.q_lora_rank + sizes.kv_lora_rank;
  StoreLatentsTask task = {.q_a = {},
                           .latent = qkv_a.Slice(1, sizes.q_lora_rank, latent_end),
                           .key = qkv_a.Slice(1, latent_end, qkv_a.dim(1)),
                           .q_norm = q_norm,
                           .kv_norm = kv_norm,
                           .eps = eps,
                           .positions = positions,
                           .cos_sin = cos_sin,
                           .places = places,
                           .q_a_out = q_a,
                           .cache = cache};
  if (sizes.q_lora_rank > 0) task.q_a = qkv_a.Slice(1, 0, sizes.q_lora_rank);

  // A row of q_a, or the latent and the key behind it.
  const auto spare_floats =
      static_cast<size_t>(std::max(sizes.q_lora_rank, sizes.kv_lora_rank + sizes.rope_dim));
  threads_.ParallelFor(sizes.tokens, SmallestRange(qkv_a.dim(1)),
                       [&](int range, int64_t begin, int64_t end) {
                         Scratch& scratch = scratch_[static_cast<size_t>(range)];
                         scratch.Reset(PadToVector(spare_floats));
                         HWY_DYNAMIC_DISPATCH(StoreRows)
                         (task, scratch.Take(spare_floats), begin, end);
                       });
}

}  // namespace fathom
#endif  // HWY_ONCE
