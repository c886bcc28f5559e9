// FP8 linear layers on Hopper for many tokens: dense layers and stacks of experts, out = x ·
// weightᵀ with x in 1×128 and weights in 128×128 blocks (Ops::Linear, Ops::GroupedLinear,
// LinearInput).
//
// Products are computed transposed, D[weight rows, tokens] = weight · xᵀ, so that a tile may have
// any number of tokens and an expert with few of them wastes nothing; every 128 inputs the sums go
// times both factors into F32 totals. Three kernels:
//   dense, many tokens   tiles of 256 weight rows × 128 tokens (128 × 128 where there are too few
//                        of them), two blocks share what both need
//   dense, few tokens    the blocks of a cluster share a tile's inputs; totals are added in a fixed
//                        order
//   experts              tiles of up to 128 rows of one expert, chunk by chunk (expert_chunks.h);
//                        of gathered rows whoever is free takes another
// All are bit by bit the same on every run.
//
// Source of the arithmetic: DeepSeek-V3 report §3.3.2. Launches of one object must not overlap:
// they share a counter of tiles.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/expert_chunks.h"
#include "kernels/cuda/scratch.h"

namespace fathom {

namespace fp8_tile {
struct Dealt;
}

class Fp8TileSm90 {
 public:
  // Whether this device can run it (compute capability 9.0).
  static bool Supports(const cudaDeviceProp& device);
  // Whether a layer of these sizes can be computed.
  static bool Supports(int64_t outputs, int64_t inputs);

  explicit Fp8TileSm90(int num_multiprocessors);

  // [experts, outputs, inputs], its blocks begin where the tensor does.
  struct Weight {
    const __nv_fp8_e4m3* values = nullptr;  // 16-byte aligned
    const float* factors = nullptr;         // [experts, ⌈outputs / 128⌉, inputs / 128]
    int experts = 1;
    int outputs = 0;  // a multiple of 64; of 128 if there are several experts
    int inputs = 0;   // a multiple of 128
  };
  struct Input {
    const __nv_fp8_e4m3* values = nullptr;  // [rows, inputs], 16-byte aligned
    const float* scales = nullptr;          // [rows, inputs / 128]
    int rows = 0;
    int64_t values_stride = 0;  // between rows, elements; a multiple of 16
    int64_t scales_stride = 0;
  };
  struct Output {
    __nv_bfloat16* values = nullptr;  // [rows, outputs], 16-byte aligned
    int64_t stride = 0;               // between rows, elements; a multiple of 8
  };

  // out[t] = weight · x[t], one expert.
  void Linear(const Input& x, const Weight& weight, const Output& out, cudaStream_t stream) const;

  // The sorted rows of a step (ExpertGroups).
  struct Groups {
    const int* notes = nullptr;  // chunks of at most 128 rows
    const int* rows = nullptr;   // row i of the output comes from row rows[i] / divisor of x;
    int divisor = 0;             // 0: from row i, and `rows` is not read
  };
  void GroupedLinear(const Input& x, const Groups& groups, const Weight& weight, const Output& out,
                     cudaStream_t stream) const;

 private:
  static constexpr int kMaxSplits = 8;

  void LinearOfFewTiles(const Input& x, const Weight& weight, const Output& out, int tokens,
                        cudaStream_t stream) const;
  void LinearOfWideTiles(const Input& x, const Weight& weight, const Output& out,
                         cudaStream_t stream) const;
  void LinearOfManyTiles(const Input& x, const Weight& weight, const Output& out,
                         cudaStream_t stream) const;

  int num_multiprocessors_;
  GrowingMemory dealt_memory_;
  fp8_tile::Dealt* dealt_ = nullptr;  // zero between kernels
  // [tokens of a tile: 32, 64, 128][blocks of a cluster] how many clusters run at once
  int clusters_[3][kMaxSplits + 1] = {};
};

}  // namespace fathom
