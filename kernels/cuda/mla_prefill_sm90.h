// Multi-head latent attention for chunks of prompts on Hopper: 16 heads (one rank of DeepSeek-V3 at
// tensor-parallel 8), a paged latent cache in BF16 or FP8.
//
// Keys and values are computed from the cached latents, [k_nope | v] = latent · [w_uk | w_uvᵀ], and
// then it is attention with heads of 192 and 128: with many queries per key 3.4 times less work
// than in the latent space. Per layer a piece of at most `piece_tokens` cached tokens is expanded
// into scratch, then attention runs over it; what does not fit comes in further pieces, and the
// running softmax of a sequence cut in two waits in scratch between them.
//
// A sequence begins at a multiple of 128 tokens of the scratch and is divided into tiles of 128
// keys and 128 queries; the costliest tiles are computed first. Each is computed by one block in a
// fixed order: the same bits on every run.
//
// Thread-safe but for the workspace, which one step uses at a time.
// Source: DeepSeek-V2 report §2.1.2; FlashAttention-3 (arXiv:2407.08608) §3 for the overlap of
// softmax and products. Layout: as Ops::MlaAttention.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/mla_cache.h"

namespace fathom {

class MlaPrefillSm90 {
 public:
  static constexpr int kHeads = 16;
  static constexpr int kKvLoraRank = 512;
  static constexpr int kRopeHeadDim = 64;
  static constexpr int kHeadDim = 128;        // of a key without its rotated part, and of a value
  static constexpr int kMaxSequences = 1024;  // of one step

  struct Limits {
    int max_tokens = 0;              // queries of one step
    int64_t max_context_tokens = 0;  // of one step's sequences together
    int piece_tokens = 16384;        // expanded at once, a multiple of 128
  };
  // Device memory that the calls below share; contents need not survive between steps.
  static int64_t WorkspaceBytes(const Limits& limits);

  // Whether this device can run it (compute capability 9.0).
  static bool Supports(const cudaDeviceProp& device);

  // REQUIRES: workspace of WorkspaceBytes, 1024-byte aligned. Does not own it.
  MlaPrefillSm90(void* workspace, const Limits& limits, int num_multiprocessors);

  // Sequences with at least `min_chunk` queries in this step are computed, the others left alone.
  struct Batch {
    int num_sequences = 0;
    int min_chunk = 1;
    const int* query_start = nullptr;        // [num_sequences + 1], device
    const int* context_lens = nullptr;       // [num_sequences], device, this step's tokens included
    const int* host_query_start = nullptr;   // the same numbers
    const int* host_context_lens = nullptr;  // the same numbers
  };
  struct Step {
    int num_tokens = 0;  // rows of q
    int num_pieces = 0;
  };
  // Once per step, before the first layer: divides the work.
  Step Schedule(const Batch& batch, cudaStream_t stream) const;

  enum class Parts { kAll, kExpansion, kAttention };  // one alone: to measure it

  struct Layer {
    const __nv_bfloat16* q = nullptr;     // [T, 16, 192], the last 64 not yet rotated
    const __nv_bfloat16* w_uk = nullptr;  // [16, 512, 128]
    const __nv_bfloat16* w_uv = nullptr;  // [16, 128, 512]
    const int* positions = nullptr;       // [T]
    const float* cos_sin = nullptr;       // [max positions, 32, 2], 16-byte aligned
    const int* block_tables = nullptr;    // [num_sequences, max_blocks]
    int max_blocks = 0;
    float scale = 0.0f;  // of the scores
    // One of the two: [T, 16 * 128] bf16, or e4m3 in 1×128 with its factors.
    __nv_bfloat16* out = nullptr;
    void* out_fp8 = nullptr;
    float* out_scales = nullptr;  // [T, 16]
    Parts parts = Parts::kAll;
  };
  void Run(const Step& step, const MlaCache& cache, const Layer& layer, cudaStream_t stream) const;

 private:
  void* workspace_;
  Limits limits_;
  int num_multiprocessors_;
};

}  // namespace fathom
