// Into the latent space and out of it, around the attention kernels, in the shape of DeepSeek-V3:
// kv_lora_rank 512, qk_nope_head_dim and v_head_dim 128, BF16. Any number of heads and tokens.
//
// Few tokens make both a stream of their weights (2 MB each for 16 heads), which every block has in
// registers before the kernel before it has ended. Absorb also rotates the query; Project also
// quantises, for which eight blocks of a cluster, each with 16 of a head's 128 values, tell each
// other their largest ones.
//
// Runs on every GPU that the backend supports. Thread-safe.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fathom::cuda {

inline constexpr int kLatentSize = 512;
inline constexpr int kHeadSize = 128;  // of what is not rotated, and of values

struct Absorption {
  const __nv_bfloat16* q = nullptr;     // [T, A, 128 + rope_dim], not rotated; 16-byte aligned rows
  int64_t q_token_stride = 0;           // elements, a multiple of 8
  int64_t q_head_stride = 0;            // the same
  const __nv_bfloat16* w_uk = nullptr;  // [A, 512, 128]
  // Row r reads the query and the position of token tokens[r]; null: of token r.
  const int* tokens = nullptr;
  const int* positions = nullptr;  // [T]
  int64_t positions_stride = 1;
  const float* cos_sin = nullptr;  // [max positions, rope_dim / 2, 2], 16-byte aligned
  int num_tokens = 0;              // rows
  int num_heads = 0;
  int rope_dim = 0;                   // a multiple of 8
  __nv_bfloat16* q_latent = nullptr;  // [T, A, 512] out: w_uk · q
  __nv_bfloat16* q_rope = nullptr;    // [T, A, rope_dim] out: rotated
};
void Absorb(const Absorption& absorption, cudaStream_t stream);

struct ValueProjection {
  const __nv_bfloat16* latent = nullptr;  // [T, A, 512]
  const __nv_bfloat16* w_uv = nullptr;    // [A, 128, 512]
  int num_tokens = 0;                     // rows
  int num_heads = 0;
  const int* tokens = nullptr;  // row r writes the output of token tokens[r]; null: of token r
  // [T, A * 128] out: w_uv · latent; bf16, or e4m3 if there are scales [T, A]
  void* out = nullptr;
  int64_t out_stride = 0;  // elements, between tokens
  float* scales = nullptr;
  int64_t scales_stride = 0;
};
void Project(const ValueProjection& projection, cudaStream_t stream);

}  // namespace fathom::cuda
