// What stands between the first linear layer of attention and the others: two norms, the rotated
// key, and the cache. A block takes a token; whole warps take the query's latent, then the KV one,
// then the key, eight elements to a lane.

#include <cmath>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/shape_checks.h"

namespace fathom {
namespace cuda {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kWarpColumns = kWarp * kEight;

template <typename Act>
struct LatentArguments {
  Rows<const Act> qkv_a;
  const float* q_norm;
  const float* kv_norm;
  float eps;
  Rows<const int> positions;  // one to a row
  const float* cos_sin;
  Rows<const int> places;
  OutputRows q_a;
  void* cache;
  int64_t cache_token_bytes;
  int num_rows, q_size, kv_size, key_size;
};

// Cached in the type of `Stored`; __nv_fp8_e4m3: latent in 1×128, factors, key in BF16.
template <typename Stored, bool kAligned>
__device__ void CacheLatent(const float (&latent)[kEight], int column, int count, int kv_size,
                            char* token) {
  if constexpr (sizeof(Stored) > 1) {
    if (count > 0) StoreEight<kAligned>(latent, count, reinterpret_cast<Stored*>(token) + column);
  } else {
    const float factor = FactorOf(WarpMax<kGroupLanes>(LargestOf(latent)));
    if (count <= 0) return;
    StoreCodes<kAligned>(EncodeEight(latent, factor), count,
                         reinterpret_cast<uint8_t*>(token) + column);
    if (column % kFp8Block == 0) {
      memcpy(token + kv_size + column / kFp8Block * sizeof(float), &factor, sizeof factor);
    }
  }
}

template <typename Stored, bool kAligned>
__device__ void CacheKey(const float (&key)[kEight], int column, int count, int kv_size,
                         char* token) {
  if constexpr (sizeof(Stored) > 1) {
    StoreEight<kAligned>(key, count, reinterpret_cast<Stored*>(token) + kv_size + column);
  } else {
    char* to = token + kv_size + (kv_size + kFp8Block - 1) / kFp8Block * sizeof(float) +
               column * sizeof(__nv_bfloat16);
    if constexpr (kAligned) {
      StoreEight<true>(key, count, reinterpret_cast<__nv_bfloat16*>(to));
    } else {
      for (int i = 0; i < min(count, kEight); ++i) {
        // BF16 is the upper half of a float. The two bytes need not be aligned.
        const uint32_t bits = __float_as_uint(RoundedTo<__nv_bfloat16>(key[i]));
        to[2 * i] = static_cast<char>(bits >> 16);
        to[2 * i + 1] = static_cast<char>(bits >> 24);
      }
    }
  }
}

template <typename Act, typename Stored, bool kAligned>
__global__ __launch_bounds__(kMostThreads) void StoreLatentsKernel(
    const LatentArguments<Act> arguments) {
  __shared__ float warp_sums[kMostThreads / kWarp];
  LetDependentsLaunch();
  const int row = blockIdx.x;
  const int q_warps = (arguments.q_size + kWarpColumns - 1) / kWarpColumns;
  const int kv_warps = (arguments.kv_size + kWarpColumns - 1) / kWarpColumns;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool is_q = warp < q_warps, is_key = warp >= q_warps + kv_warps;
  const int first_warp = is_q ? 0 : is_key ? q_warps + kv_warps : q_warps;
  const int column = (warp - first_warp) * kWarpColumns + lane * kEight;
  const int begin = is_q ? 0 : arguments.q_size + (is_key ? arguments.kv_size : 0);
  const int size = is_q ? arguments.q_size : is_key ? arguments.key_size : arguments.kv_size;
  const int count = size - column;
  float gain[kEight] = {}, values[kEight] = {};
  if (!is_key && count > 0) {
    LoadEight<kAligned>((is_q ? arguments.q_norm : arguments.kv_norm) + column, count, gain);
  }
  // Where the tokens stand was known before the step began.
  char* token = static_cast<char*>(arguments.cache) +
                int64_t{*arguments.places[row]} * arguments.cache_token_bytes;
  float turns[kEight] = {};
  if (is_key && count > 0) {
    LoadEight<kAligned>(
        arguments.cos_sin + int64_t{*arguments.positions[row]} * arguments.key_size + column, count,
        turns);
  }
  WaitForPredecessors();

  if (count > 0) LoadEight<kAligned>(arguments.qkv_a[row] + begin + column, count, values);
  float sum = 0.0f;
#pragma unroll
  for (const float value : values) sum += value * value;
  sum = WarpSum(sum);
  if (lane == 0) warp_sums[warp] = sum;
  if (is_key && count > 0) {
    RotateEight(turns, values);
#pragma unroll
    for (float& value : values) value = RoundedTo<Act>(value);
    CacheKey<Stored, kAligned>(values, column, count, arguments.kv_size, token);
  }
  __syncthreads();
  if (is_key) return;

  sum = 0.0f;
  for (int w = first_warp; w < first_warp + (is_q ? q_warps : kv_warps); ++w) sum += warp_sums[w];
  const float factor = 1.0f / sqrtf(sum / static_cast<float>(size) + arguments.eps);
#pragma unroll
  for (int i = 0; i < kEight; ++i) values[i] = RoundedTo<Act>(values[i] * factor * gain[i]);
  if (is_q) {
    arguments.q_a.template Store<Act, kAligned>(values, row, column, count);
  } else {
    CacheLatent<Stored, kAligned>(values, column, count, arguments.kv_size, token);
  }
}

template <typename Act, typename Stored>
void Launch(const LatentArguments<Act>& arguments, bool aligned, cudaStream_t stream) {
  const int64_t warps = DivideUp(arguments.q_size, kWarpColumns) +
                        DivideUp(arguments.kv_size, kWarpColumns) +
                        DivideUp(arguments.key_size, kWarpColumns);
  CHECK_LE(warps, kMostThreads / kWarp)
      << arguments.q_size << " + " << arguments.kv_size << " + " << arguments.key_size;
  const LaunchShape shape = {dim3(arguments.num_rows), dim3(static_cast<unsigned>(warps * kWarp))};
  VisitBool(aligned, [&](auto is_aligned) {
    LaunchDependent(StoreLatentsKernel<Act, Stored, decltype(is_aligned)::value>, shape, stream,
                    arguments);
  });
}

}  // namespace
}  // namespace cuda

void CudaOps::StoreLatents(const Tensor& qkv_a, const Tensor& q_norm, const Tensor& kv_norm,
                           float eps, const Tensor& positions, const Tensor& cos_sin,
                           const Tensor& places, const LinearInput& q_a, const Tensor& cache) {
  CheckStoreLatents(qkv_a, q_norm, kv_norm, positions, cos_sin, places, q_a, cache);
  if (qkv_a.dim(0) == 0) return;
  const int64_t q_size = q_norm.present() ? q_norm.dim(0) : 0;
  const int64_t token_bytes = cache.dim(2) * SizeOf(cache.dtype());
  const int64_t kv_size = kv_norm.dim(0), key_size = 2 * cos_sin.dim(1);
  const bool is_fp8 = cache.dtype() == DType::kF8E4M3;
  const int64_t key_at = is_fp8 ? kv_size + 4 * cuda::DivideUp(kv_size, kFp8Block) : kv_size;
  const auto is_multiple = [](auto number) { return number % 16 == 0; };
  const bool aligned = cuda::AreAlignedForEight(qkv_a, q_norm, kv_norm, q_a.values) &&
                       key_size % cuda::kEight == 0 && is_multiple(key_at) &&
                       is_multiple(token_bytes) &&
                       is_multiple(reinterpret_cast<uintptr_t>(cache.raw())) &&
                       is_multiple(reinterpret_cast<uintptr_t>(cos_sin.raw()));
  cuda::VisitAct(qkv_a.dtype(), [&](auto act) {
    using Act = decltype(act);
    const cuda::LatentArguments<Act> arguments = {
        .qkv_a = cuda::Rows<const Act>(qkv_a),
        .q_norm = q_size > 0 ? q_norm.data<float>() : nullptr,
        .kv_norm = kv_norm.data<float>(),
        .eps = eps,
        .positions = cuda::Rows<const int>(positions),
        .cos_sin = cos_sin.data<float>(),
        .places = cuda::Rows<const int>(places),
        .q_a = cuda::OutputRows(q_a),
        .cache = cache.raw(),
        .cache_token_bytes = token_bytes,
        .num_rows = static_cast<int>(qkv_a.dim(0)),
        .q_size = static_cast<int>(q_size),
        .kv_size = static_cast<int>(kv_size),
        .key_size = static_cast<int>(key_size)};
    cuda::VisitWeight(cache.dtype(), [&](auto stored) {
      cuda::Launch<Act, decltype(stored)>(arguments, aligned, stream_);
    });
  });
}

}  // namespace fathom
