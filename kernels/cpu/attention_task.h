// The arguments of attention in the latent space as plain pointers, because they are handed to code
// compiled for several instruction sets, and the pieces that threads share out.
#pragma once

#include <cstdint>

#include "kernels/tensor.h"

namespace fathom {

// Positions are taken in tiles that begin at multiples of this, whatever the block size.
inline constexpr int kTilePositions = 64;
// Rows (token × head) that share a converted tile of the cache.
inline constexpr int kMostAttentionRows = 64;

// Tokens that MlaAttention takes through all its steps at a time, so that what lies between the
// steps stays small.
inline constexpr int64_t kMostAttentionTokens = 256;

struct AttentionTask {
  const void* q_latent = nullptr;
  const void* q_rope = nullptr;
  void* out = nullptr;
  DType act_type = DType::kF32;
  int64_t q_latent_strides[2] = {};  // elements: token, head
  int64_t q_rope_strides[2] = {};
  int64_t out_strides[2] = {};
  int kv_lora_rank = 0;  // R
  int rope_dim = 0;      // P
  float scale = 0.0f;

  const void* cache = nullptr;
  DType cache_type = DType::kF32;
  int block_size = 0;
};

// Consecutive tokens of one sequence, and some of their heads.
struct AttentionPiece {
  const int32_t* block_table = nullptr;
  int64_t first_token = 0;  // of the task's tensors
  int num_tokens = 0;
  int first_context = 0;  // tokens that first_token sees, itself included; one more for the next
  int first_head = 0;
  int num_heads = 0;
};

}  // namespace fathom
