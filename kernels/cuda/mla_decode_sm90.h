// Decoding with multi-head latent attention on Hopper: few query tokens per sequence, 16 heads (one
// rank of DeepSeek-V3 at tensor-parallel 8), a BF16 or FP8 latent cache.
//
// The work of a step is rows: a query token, a block table and how many cached tokens it sees. The
// cache is read once per row and every byte is worth only 2 · 16 · (576 + 512) / 1152 ≈ 30 FLOP, so
// the kernel is a stream: the multiprocessors, in clusters of 1 to 16 that take a row together,
// read equal shares of all rows' tokens. Shares end where rows end unless that would make them
// unequal; a row that several clusters share is combined by them, each a slice of the output, in
// the order of the shares: the same bits on every run.
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

#include "kernels/cuda/mla_cache.h"

namespace fathom {

class MlaDecodeSm90 {
 public:
  static constexpr int kHeads = 16;
  static constexpr int kKvLoraRank = 512;
  static constexpr int kRopeHeadDim = 64;
  static constexpr int kBlockSizeUnit = 16;  // tokens per KV block: a multiple of this
  static constexpr int kMaxRows = 1024;

  // How the kernel sees one layer of the cache. Made once per layer.
  struct CacheMap {
    CUtensorMap tokens = {};                // BF16
    const unsigned char* stored = nullptr;  // FP8
    MlaCacheType type = MlaCacheType::kBf16;
    int block_size = 0;
  };
  static CacheMap MapCache(const MlaCache& cache);

  // Device memory that the calls below share; contents need not survive between steps.
  static int64_t WorkspaceBytes(int num_layers, int num_multiprocessors);

  // Whether this device can run it (compute capability 9.0).
  static bool Supports(const cudaDeviceProp& device);

  // REQUIRES: workspace of WorkspaceBytes, 256-byte aligned. Does not own it.
  MlaDecodeSm90(void* workspace, int num_layers, int num_multiprocessors);

  // What one step attends to; device memory. Rows of one sequence are neighbours, in its order.
  struct Rows {
    int count = 0;                      // 1 to kMaxRows
    const int* context_lens = nullptr;  // [count] tokens the row sees, its own included, at least 1
    const int* sequences = nullptr;     // [count] its line of the block tables; null: row r is r
    const int* tokens = nullptr;        // [count] its line of queries and output; null: row r is r
  };
  // Once per step, before the first layer: shares the work out.
  void Schedule(const Rows& rows, cudaStream_t stream) const;

  // When the first tokens of the cache are requested.
  enum class Start {
    kAfterPredecessors,
    // While the kernel before still runs, all but the tokens of this step. REQUIRES: everything up
    // to Schedule and to the cache of earlier steps is complete by then, that is, some kernel
    // between lets its dependents launch only after it waited for its own predecessors.
    kEarly,
  };
  struct Layer {
    int index = 0;  // below num_layers: layers of one step may overlap and must not share counters
    int num_rows = 0;                         // as given to Schedule
    const __nv_bfloat16* q_latent = nullptr;  // [tokens, 16, 512]
    const __nv_bfloat16* q_rope = nullptr;    // [tokens, 16, 64], rotated, 16-byte aligned
    int64_t q_rope_token_stride = kHeads * kRopeHeadDim;  // elements, a multiple of 8
    int64_t q_rope_head_stride = kRopeHeadDim;            // the same
    const int* block_tables = nullptr;                    // [sequences, max_blocks]
    int max_blocks = 0;
    float scale = 0.0f;            // of the scores
    __nv_bfloat16* out = nullptr;  // [tokens, 16, 512]
    Start start = Start::kAfterPredecessors;
  };
  void Run(const CacheMap& cache, const Layer& layer, cudaStream_t stream) const;

 private:
  void* workspace_;
  int num_layers_;
  int num_multiprocessors_;
};

}  // namespace fathom
