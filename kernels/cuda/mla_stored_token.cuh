// A token of an FP8 latent cache (mla_cache.h) in memory, and how its codes become bf16.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "kernels/cuda/sm90_bf16.cuh"

namespace fathom::mla_stored_token {

constexpr int kCodes = 512;
constexpr int kFactorColumns = 128;  // codes under one factor
constexpr int kKeyAt = kCodes + kCodes / kFactorColumns * 4;
constexpr int kBytes = kKeyAt + 64 * 2;
static_assert(kBytes == 656 && kKeyAt % 16 == 0);

// The factor of the codes from `column` on.
__device__ inline float FactorOf(const unsigned char* token, int column) {
  return reinterpret_cast<const float*>(token + kCodes)[column / kFactorColumns];
}

// Sixteen codes times their factor, each rounded once.
__device__ inline void Convert(uint4 codes, float factor, uint4 (&latents)[2]) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  uint32_t wide[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const __half2 pair(__nv_cvt_fp8x2_to_halfraw2(
        static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> (i % 2 * 16)), __NV_E4M3));
    const float2 values = __half22float2(pair);
    wide[i] = sm90::PackBf16(values.x * factor, values.y * factor);
  }
  latents[0] = make_uint4(wide[0], wide[1], wide[2], wide[3]);
  latents[1] = make_uint4(wide[4], wide[5], wide[6], wide[7]);
}

}  // namespace fathom::mla_stored_token
