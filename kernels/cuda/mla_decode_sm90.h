// Decoding with multi-head latent attention on Hopper: one query token per sequence, 16 heads (one
// rank of DeepSeek-V3 at tensor-parallel 8), a BF16 latent cache in blocks of 64 tokens.
//
// The cache is read once and every byte is worth only 2 · 16 · (576 + 512) / 1152 ≈ 30 FLOP, so the
// kernel is a stream: all SMs take equal, contiguous shares of all sequences' tokens, and an SM's
// share may end in the middle of a sequence. Such sequences are combined by the SMs that share
// them, each a slice of the output, in the order of the shares: the same bits on every run.
//
// Scores are computed transposed, S'[64 tokens, 16 heads] = KV · Q', so that the 16 heads are the
// narrow side of the matrix product and no lane of the tensor cores works on padding; the output
// likewise, O'[512, 16 heads] = KV' · P', from the same bytes in shared memory.
//
// Source of the mathematics: DeepSeek-V2 report §2.1.2–2.1.3. Layout: as Ops::MlaAttention.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fathom {

class MlaDecodeSm90 {
 public:
  static constexpr int kHeads = 16;
  static constexpr int kKvLoraRank = 512;
  static constexpr int kRopeHeadDim = 64;
  static constexpr int kBlockSize = 64;  // tokens per KV block
  static constexpr int kMaxSequences = 1024;

  // How the copy engine sees one layer of the cache, [num_blocks, 64, 576] bf16. Made once per
  // layer.
  struct CacheMaps {
    CUtensorMap blocks;  // 64 tokens at once
    CUtensorMap pieces;  // 16 tokens
  };
  static CacheMaps MapCache(void* cache, int64_t num_blocks);

  // Device memory that the calls below share; contents need not survive between steps.
  static int64_t WorkspaceBytes(int num_layers, int num_multiprocessors);

  // Whether this device can run it (compute capability 9.0).
  static bool Supports(const cudaDeviceProp& device);

  // REQUIRES: workspace of WorkspaceBytes, 256-byte aligned. Does not own it.
  MlaDecodeSm90(void* workspace, int num_layers, int num_multiprocessors);

  // Once per step, before the first layer: shares the work out.
  //   context_lens [num_sequences] i32, device memory, each at least 1
  void Schedule(const int* context_lens, int num_sequences, cudaStream_t stream) const;

  struct Layer {
    int index = 0;  // below num_layers: layers of one step may overlap and must not share counters
    const __nv_bfloat16* q_latent = nullptr;  // [num_sequences, 16, 512]
    const __nv_bfloat16* q_rope = nullptr;    // [num_sequences, 16, 64], rotated, 16-byte aligned
    int64_t q_rope_token_stride = kHeads * kRopeHeadDim;  // elements, a multiple of 8
    int64_t q_rope_head_stride = kRopeHeadDim;            // the same
    const int* block_tables = nullptr;                    // [num_sequences, max_blocks]
    int max_blocks = 0;
    const int* context_lens = nullptr;  // [num_sequences], as given to Schedule
    float scale = 0.0f;                 // of the scores
    __nv_bfloat16* out = nullptr;       // [num_sequences, 16, 512]
  };
  void Run(const CacheMaps& cache, const Layer& layer, cudaStream_t stream) const;

 private:
  void* workspace_;
  int num_layers_;
  int num_multiprocessors_;
};

}  // namespace fathom
