// Keys and values from cached latents (mla_prefill_plan.h): a matrix product [tokens, 512] ·
// [512, 16 · 256], a block per 128 tokens and head. The latents come straight from the pages of a
// BF16 cache; an FP8 one is dequantised first.

#include <cuda_fp8.h>

#include "base/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/mla_prefill_plan.h"
#include "kernels/cuda/sm90_bf16.cuh"
#include "kernels/cuda/sm90_launch.h"

namespace fathom::mla_prefill {
namespace {

using sm90::BarrierArriveIf;
using sm90::BarrierWait;
using sm90::OperandB;
using sm90::SharedAddress;
using sm90::TileDescriptor;
using sm90::TransposedDescriptor;

constexpr int kThreads = 384;  // a warpgroup that copies, two that compute 64 tokens each
constexpr int kStages = 4;
constexpr int kSteps = kRank / 64;
constexpr int kHalfBoxBytes = 64 * 128;  // 64 rows
constexpr int kFp8TokenBytes = kRank + kRank / 128 * 4 + kRope * 2;
constexpr int kBf16TokenElements = kRank + kRope;

struct SharedMemory {
  struct Stage {
    unsigned char latents[kBoxBytes];      // [128 tokens, 64]
    unsigned char w_uk[2][kHalfBoxBytes];  // [64, 128 outputs]
    unsigned char w_uv[kBoxBytes];         // [128 outputs, 64]
  };
  Stage stages[kStages];
  uint64_t full[kStages], empty[kStages];
};
constexpr int kSharedBytes = sizeof(SharedMemory) + sm90::kTileAlignment;

struct Arguments {
  const PieceCounts* counts;
  const KeyTile* tiles;
  __nv_bfloat16* keys;
  __nv_bfloat16* values;
  __nv_bfloat16* ropes;
  int piece_tokens;
  // The pages of a BF16 cache; null: latents and ropes of the piece are there already.
  const __nv_bfloat16* cache;
  const int* block_tables;
  int max_blocks;
  int block_size;
  int box_tokens;  // tokens that one box of the map holds, all in one page
};

// --- dequantising

__global__ __launch_bounds__(256) void DequantizeKernel(const PieceCounts* counts,
                                                        const KeyTile* tiles,
                                                        const unsigned char* cache,
                                                        const int* block_tables, int max_blocks,
                                                        int block_size, __nv_bfloat16* latents,
                                                        __nv_bfloat16* ropes) {
  sm90::LetDependentsLaunch();
  sm90::WaitForPredecessors();
  const int lane = threadIdx.x % 32;
  const int rows = counts->num_key_tiles * kTile;
  const int warps = gridDim.x * (blockDim.x / 32);
  for (int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32; row < rows; row += warps) {
    const KeyTile tile = tiles[row / kTile];
    const int offset = row % kTile;
    uint4 out[2] = {}, rope = {};
    if (offset < tile.count) {
      const int position = tile.first + offset;
      const int block = block_tables[tile.sequence * max_blocks + position / block_size];
      const unsigned char* token =
          cache + (int64_t{block} * block_size + position % block_size) * kFp8TokenBytes;
      const uint4 packed = reinterpret_cast<const uint4*>(token)[lane];
      const float factor = reinterpret_cast<const float*>(token + kRank)[lane / 8];
      if (lane < 8) rope = reinterpret_cast<const uint4*>(token + kRank + 16)[lane];
      const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
      uint32_t wide[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const __half2 pair(__nv_cvt_fp8x2_to_halfraw2(
            static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> (i % 2 * 16)), __NV_E4M3));
        const float2 values = __half22float2(pair);
        wide[i] = sm90::PackBf16(values.x * factor, values.y * factor);
      }
      out[0] = make_uint4(wide[0], wide[1], wide[2], wide[3]);
      out[1] = make_uint4(wide[4], wide[5], wide[6], wide[7]);
    }
    uint4* target = reinterpret_cast<uint4*>(latents + int64_t{row} * kRank) + lane * 2;
    target[0] = out[0];
    target[1] = out[1];
    if (lane < 8) reinterpret_cast<uint4*>(ropes + int64_t{row} * kRope)[lane] = rope;
  }
}

// --- the product

// Lane i of the warp copies the i-th box of latents; lane 0 the weights too.
__device__ void CopyTiles(const CUtensorMap& latents, const CUtensorMap& w_uk,
                          const CUtensorMap& w_uv, const Arguments& arguments, int items, int lane,
                          SharedMemory& shared) {
  const uint64_t keep = sm90::EvictLastPolicy();
  int step = 0;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const int head = item % kHeads;
    const KeyTile tile = arguments.tiles[item / kHeads];
    const int box_tokens = arguments.box_tokens;
    const int boxes = (tile.count + box_tokens - 1) / box_tokens;
    int row = item / kHeads * kTile + lane * box_tokens;
    if (arguments.cache != nullptr && lane < boxes) {
      const int position = tile.first + lane * box_tokens;
      row = arguments.block_tables[tile.sequence * arguments.max_blocks +
                                   position / arguments.block_size] *
                arguments.block_size +
            position % arguments.block_size;
    }
    for (int k = 0; k < kSteps; ++k, ++step) {
      const int at = step % kStages;
      SharedMemory::Stage& stage = shared.stages[at];
      if (step >= kStages) BarrierWait(&shared.empty[at], (step / kStages - 1) & 1);
      if (lane == 0) {
        sm90::BarrierExpectBytes(&shared.full[at], 2 * kBoxBytes + boxes * box_tokens * 128);
        sm90::CopyBox(stage.w_uk[0], &w_uk, 0, head * kRank + k * 64, &shared.full[at], keep);
        sm90::CopyBox(stage.w_uk[1], &w_uk, 64, head * kRank + k * 64, &shared.full[at], keep);
        sm90::CopyBox(stage.w_uv, &w_uv, k * 64, head * kHeadDim, &shared.full[at], keep);
      }
      __syncwarp();
      if (lane < boxes) {
        sm90::CopyBox(stage.latents + lane * box_tokens * 128, &latents, k * 64, row,
                      &shared.full[at], keep);
      }
    }
  }
}

// The rotated keys of the blocks' first heads, by `threads` threads numbered from 0.
__device__ void CopyRopes(const Arguments& arguments, int items, int thread, int threads) {
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    if (item % kHeads != 0) continue;
    const KeyTile tile = arguments.tiles[item / kHeads];
    for (int i = thread; i < kTile * 8; i += threads) {
      const int offset = i / 8, piece = i % 8;
      uint4 values = {};
      if (offset < tile.count) {
        const int position = tile.first + offset;
        const int block = arguments.block_tables[tile.sequence * arguments.max_blocks +
                                                 position / arguments.block_size];
        values = reinterpret_cast<const uint4*>(
            arguments.cache +
            (int64_t{block} * arguments.block_size + position % arguments.block_size) *
                kBf16TokenElements +
            kRank)[piece];
      }
      reinterpret_cast<uint4*>(arguments.ropes +
                               (int64_t{item / kHeads} * kTile + offset) * kRope)[piece] = values;
    }
  }
}

// Rows row and row + 8 of `out`, [.., 128]; zeros where they do not exist.
__device__ void StoreRows(const float (&sums)[64], __nv_bfloat16* out, int row, int count,
                          int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool exists = row + half * 8 < count;
    __nv_bfloat16* target = out + (row + half * 8) * kHeadDim + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* pair = &sums[(i * 4 + j) * 4 + half * 2];
        words[j] = exists ? sm90::PackBf16(pair[0], pair[1]) : 0;
      }
      sm90::TransposeQuad(words, lane);
      *reinterpret_cast<uint4*>(target + i * 32) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

__device__ void ComputeTiles(const Arguments& arguments, int items, int thread,
                             SharedMemory& shared) {
  const int lane = thread % 32, group = thread / 128;
  const int row = thread / 32 * 16 + lane / 4;
  int step = 0;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    float keys[64], values[64];
    for (int k = 0; k < kSteps; ++k, ++step) {
      const int at = step % kStages;
      const uint32_t latents = SharedAddress(shared.stages[at].latents) + group * kHalfBoxBytes;
      const uint32_t w_uk = SharedAddress(shared.stages[at].w_uk);
      const uint32_t w_uv = SharedAddress(shared.stages[at].w_uv);
      BarrierWait(&shared.full[at], step / kStages & 1);
      sm90::ProductsBegin();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint64_t a = TileDescriptor(latents + i * 32);
        sm90::ProductBf16N128<OperandB::kTransposed>(
            keys, a, TransposedDescriptor(w_uk + i * 16 * 128, kHalfBoxBytes), (k | i) != 0);
        sm90::ProductBf16N128<OperandB::kAsStored>(values, a, TileDescriptor(w_uv + i * 32),
                                                   (k | i) != 0);
      }
      sm90::ProductsCommit();
      sm90::ProductsWait<1>();
      BarrierArriveIf(&shared.empty[(step + kStages - 1) % kStages], lane == 0 && k > 0);
    }
    sm90::ProductsWait<0>();
    BarrierArriveIf(&shared.empty[(step + kStages - 1) % kStages], lane == 0);

    const int64_t first =
        (int64_t{item % kHeads} * arguments.piece_tokens + item / kHeads * kTile) * kHeadDim;
    const int count = arguments.tiles[item / kHeads].count;
    StoreRows(keys, arguments.keys + first, row, count, lane);
    StoreRows(values, arguments.values + first, row, count, lane);
  }
}

__global__ __launch_bounds__(kThreads,
                             1) void ExpandKernel(const __grid_constant__ CUtensorMap latents,
                                                  const __grid_constant__ CUtensorMap w_uk,
                                                  const __grid_constant__ CUtensorMap w_uv,
                                                  const Arguments arguments) {
  extern __shared__ unsigned char dynamic_shared[];
  SharedMemory& shared = *reinterpret_cast<SharedMemory*>(
      (reinterpret_cast<uintptr_t>(dynamic_shared) + 1023) & ~uintptr_t{1023});
  const int thread = threadIdx.x;
  if (thread == 0) {
    sm90::PrefetchMap(&latents);
    sm90::PrefetchMap(&w_uk);
    sm90::PrefetchMap(&w_uv);
    for (int i = 0; i < kStages; ++i) {
      sm90::BarrierInit(&shared.full[i], 1);
      sm90::BarrierInit(&shared.empty[i], 8);
    }
    sm90::BarrierInitFence();
  }
  sm90::LetDependentsLaunch();
  __syncthreads();
  sm90::WaitForPredecessors();
  const int items = arguments.counts->num_key_tiles * kHeads;
  if (thread < 128) {
    sm90::GiveRegisters<40>();
    if (thread < 32) {
      CopyTiles(latents, w_uk, w_uv, arguments, items, thread, shared);
    } else if (arguments.cache != nullptr) {
      CopyRopes(arguments, items, thread - 32, 96);
    }
  } else {
    sm90::TakeRegisters<232>();
    ComputeTiles(arguments, items, thread - 128, shared);
  }
}

CUtensorMap MapBf16(const void* data, int64_t rows, int64_t columns, int box_rows) {
  return sm90::MapMatrix({.data = const_cast<void*>(data),
                          .type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                          .element_bytes = 2,
                          .rows = rows,
                          .columns = columns,
                          .box_rows = box_rows,
                          .box_columns = 64});
}

}  // namespace

void PrepareExpand() {
  CUDA_CHECK(cudaFuncSetAttribute(ExpandKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  kSharedBytes));
}

void Expand(const Workspace& workspace, int piece, const Expansion& expansion,
            int num_multiprocessors, cudaStream_t stream) {
  const MlaPrefillSm90::Cache& cache = expansion.cache;
  const bool paged = cache.type == MlaPrefillSm90::CacheType::kBf16;
  const int tiles = workspace.piece_tokens / kTile;
  Arguments arguments = {.counts = workspace.counts + piece,
                         .tiles = workspace.key_tiles + int64_t{piece} * tiles,
                         .keys = workspace.keys,
                         .values = workspace.values,
                         .ropes = workspace.ropes,
                         .piece_tokens = workspace.piece_tokens,
                         .cache = nullptr,
                         .block_tables = expansion.block_tables,
                         .max_blocks = expansion.max_blocks,
                         .block_size = cache.block_size,
                         .box_tokens = kTile};
  CUtensorMap latents;
  if (paged) {
    arguments.cache = static_cast<const __nv_bfloat16*>(cache.data);
    arguments.box_tokens = cache.block_size % 64 == 0 ? 64 : 16;
    latents = MapBf16(cache.data, cache.num_blocks * cache.block_size, kBf16TokenElements,
                      arguments.box_tokens);
  } else {
    cuda::LaunchDependent(
        DequantizeKernel, {dim3(num_multiprocessors * 4), dim3(256)}, stream, arguments.counts,
        arguments.tiles, static_cast<const unsigned char*>(cache.data), expansion.block_tables,
        expansion.max_blocks, cache.block_size, workspace.latents, workspace.ropes);
    latents = MapBf16(workspace.latents, workspace.piece_tokens, kRank, kTile);
  }
  sm90::LaunchDependent(ExpandKernel, num_multiprocessors, kThreads, kSharedBytes, stream, latents,
                        MapBf16(expansion.w_uk, kHeads * kRank, kHeadDim, 64),
                        MapBf16(expansion.w_uv, kHeads * kHeadDim, kRank, kTile), arguments);
}

}  // namespace fathom::mla_prefill
