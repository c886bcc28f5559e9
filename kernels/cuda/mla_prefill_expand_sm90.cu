// Keys and values from cached latents (mla_prefill_plan.h): a matrix product [tokens, 512] ·
// [512, 16 · 256]. The latents come straight from the pages of a BF16 cache; an FP8 one is
// dequantised first.
//
// What limits such a product here is shared memory, which every operand goes through. So a block
// keeps its weights, 128 keys' or values' columns of one head, in registers, where wgmma takes its
// first operand from: [outputs, tokens] = weights · latentsᵀ, 64 outputs per warpgroup, and only
// latents stream. The two blocks of a head work on the same tokens at the same time, and each
// copies half of them into the shared memory of both.

#include "base/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/mla_prefill_plan.h"
#include "kernels/cuda/mla_stored_token.cuh"
#include "kernels/cuda/sm90_bf16.cuh"
#include "kernels/cuda/sm90_launch.h"

namespace fathom::mla_prefill {
namespace {

using sm90::BarrierWait;
using sm90::OperandB;
using sm90::SharedAddress;
using sm90::SyncThreads;
using sm90::TileDescriptor;

constexpr int kThreads = 384;  // a warpgroup that copies, two that compute
constexpr int kCluster = 2;    // the keys' block of a head and the values'
constexpr int kStages = 10;
constexpr int kSteps = kRank / 64;
constexpr int kHalfBoxBytes = 64 * 128;  // 64 rows
constexpr int kGroup = 1;                // named barriers, one per warpgroup
constexpr int kBf16TokenElements = kRank + kRope;

struct SharedMemory {
  unsigned char latents[kStages][kBoxBytes];  // [128 tokens, 64]; the first eight: weights, before
  unsigned char out[2][kBoxBytes];            // [128 tokens, 64 outputs] of each warpgroup
  uint64_t weights_full;
  uint64_t full[kStages], empty[kStages];
};
constexpr int kSharedBytes = sizeof(SharedMemory) + sm90::kTileAlignment;
static_assert(kStages >= kSteps);

struct Arguments {
  const PieceCounts* counts;
  const KeyTile* tiles;
  __nv_bfloat16* ropes;
  int piece_tokens;
  const __nv_bfloat16* q;
  __nv_bfloat16* query_ropes;  // null: they are there already
  const int* positions;
  const float* cos_sin;
  int num_tokens;
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
          cache + (int64_t{block} * block_size + position % block_size) * mla_stored_token::kBytes;
      const uint4 codes = reinterpret_cast<const uint4*>(token)[lane];
      const float factor = mla_stored_token::FactorOf(token, lane * 16);
      if (lane < 8) rope = reinterpret_cast<const uint4*>(token + mla_stored_token::kKeyAt)[lane];
      mla_stored_token::Convert(codes, factor, out);
    }
    uint4* target = reinterpret_cast<uint4*>(latents + int64_t{row} * kRank) + lane * 2;
    target[0] = out[0];
    target[1] = out[1];
    if (lane < 8) reinterpret_cast<uint4*>(ropes + int64_t{row} * kRope)[lane] = rope;
  }
}

// --- the product

// What a block works on: the keys or the values of one head, of every `stride`-th tile of tokens.
struct Share {
  int head;
  bool is_value;
  int first, stride;
};
__device__ Share MyShare() {
  constexpr int kColumns = kHeads * kCluster;
  const int column = blockIdx.x % kColumns;
  return {column / kCluster, column % kCluster == 1, static_cast<int>(blockIdx.x) / kColumns,
          static_cast<int>(gridDim.x) / kColumns};
}

struct Maps {
  const CUtensorMap &latents, &w_uk, &w_uv, &keys, &values;
};

// Box k: the weights of inputs [64 k, 64 k + 64), as they are stored: of keys [64 inputs, 64
// outputs] for either warpgroup, of values [128 outputs, 64 inputs].
__device__ void CopyWeights(const Maps& maps, const Share& share, SharedMemory& shared) {
  const uint64_t leave = sm90::EvictFirstPolicy();
  uint64_t* full = &shared.weights_full;
  sm90::BarrierExpectBytes(full, kSteps * kBoxBytes);
  for (int k = 0; k < kSteps; ++k) {
    unsigned char* box = shared.latents[k];
    if (share.is_value) {
      sm90::CopyBox(box, &maps.w_uv, k * 64, share.head * kHeadDim, full, leave);
    } else {
      const int row = share.head * kRank + k * 64;
      sm90::CopyBox(box, &maps.w_uk, 0, row, full, leave);
      sm90::CopyBox(box + kHalfBoxBytes, &maps.w_uk, 64, row, full, leave);
    }
  }
}

// Lane i of the warp copies the i-th box of latents, if it is this block's to copy. `tile` is the
// first one.
__device__ void CopyLatents(const Maps& maps, const Arguments& arguments, const Share& share,
                            int num_key_tiles, KeyTile tile, int lane, SharedMemory& shared) {
  const uint64_t keep = sm90::EvictLastPolicy();
  constexpr uint16_t kBoth = 3;
  const int box_tokens = arguments.box_tokens;
  int step = 0;
  for (int i = share.first; i < num_key_tiles; i += share.stride) {
    if (i > share.first) tile = arguments.tiles[i];
    const int boxes = (tile.count + box_tokens - 1) / box_tokens;
    const bool mine = lane < boxes && lane % kCluster == static_cast<int>(share.is_value);
    int row = i * kTile + lane * box_tokens;
    if (arguments.cache != nullptr && mine) {
      const int position = tile.first + lane * box_tokens;
      row = arguments.block_tables[tile.sequence * arguments.max_blocks +
                                   position / arguments.block_size] *
                arguments.block_size +
            position % arguments.block_size;
    }
    for (int k = 0; k < kSteps; ++k, ++step) {
      const int stage = step % kStages;
      // The first round waits too: for both blocks to have taken their weights away.
      BarrierWait(&shared.empty[stage], step / kStages & 1);
      if (lane == 0) sm90::BarrierExpectBytes(&shared.full[stage], boxes * box_tokens * 128);
      __syncwarp();
      if (mine) {
        sm90::CopyBoxToCluster(shared.latents[stage] + lane * box_tokens * 128, &maps.latents,
                               k * 64, row, &shared.full[stage], kBoth, keep);
      }
    }
  }
}

// The rotated keys, by `threads` threads of each block numbered from 0.
__device__ void CopyRopes(const Arguments& arguments, int num_key_tiles, int thread, int threads) {
  constexpr int kPieces = 8;  // 16 bytes each
  const int stride = threads * gridDim.x;
  for (int i = blockIdx.x * threads + thread; i < num_key_tiles * kTile * kPieces; i += stride) {
    const int row = i / kPieces, piece = i % kPieces;
    const KeyTile tile = arguments.tiles[row / kTile];
    uint4 values = {};
    if (row % kTile < tile.count) {
      const int position = tile.first + row % kTile;
      const int block =
          arguments
              .block_tables[tile.sequence * arguments.max_blocks + position / arguments.block_size];
      values = reinterpret_cast<const uint4*>(
          arguments.cache +
          (int64_t{block} * arguments.block_size + position % arguments.block_size) *
              kBf16TokenElements +
          kRank)[piece];
    }
    reinterpret_cast<uint4*>(arguments.ropes + int64_t{row} * kRope)[piece] = values;
  }
}

// Turns the queries by their positions, by `threads` threads of each block numbered from 0.
__device__ void RotateQueries(const Arguments& arguments, int thread, int threads) {
  constexpr int kPieces = 8, kAtOnce = 4;  // 16 bytes each; heads
  const auto turn = [](uint32_t& pair, float cosine, float sine) {
    const float first = __uint_as_float(pair << 16);
    const float second = __uint_as_float(pair & 0xFFFF0000u);
    pair = sm90::PackBf16(first * cosine - second * sine, first * sine + second * cosine);
  };
  const int stride = threads * gridDim.x;
  for (int i = blockIdx.x * threads + thread; i < arguments.num_tokens * kPieces; i += stride) {
    const int64_t token = i / kPieces;
    const int piece = i % kPieces;
    const float4* turns = reinterpret_cast<const float4*>(
        arguments.cos_sin + int64_t{arguments.positions[token]} * kRope + piece * 8);
    const float4 low = turns[0], high = turns[1];
    const __nv_bfloat16* from = arguments.q + token * kHeads * kQueryDim + kHeadDim + piece * 8;
    __nv_bfloat16* to = arguments.query_ropes + token * kHeads * kRope + piece * 8;
    for (int head = 0; head < kHeads; head += kAtOnce) {
      uint4 values[kAtOnce];
#pragma unroll
      for (int h = 0; h < kAtOnce; ++h) {
        values[h] = *reinterpret_cast<const uint4*>(from + (head + h) * kQueryDim);
      }
#pragma unroll
      for (int h = 0; h < kAtOnce; ++h) {
        turn(values[h].x, low.x, low.y);
        turn(values[h].y, low.z, low.w);
        turn(values[h].z, high.x, high.y);
        turn(values[h].w, high.z, high.w);
        *reinterpret_cast<uint4*>(to + (head + h) * kRope) = values[h];
      }
    }
  }
}

// Where a thread of a warpgroup stands.
struct Place {
  int group, warp, lane;
};

// This warp's 16 outputs of all inputs, as wgmma wants its first operand.
__device__ void LoadWeights(const SharedMemory& shared, bool is_value, const Place& place,
                            uint32_t (&weights)[kRank / 16][4]) {
  // Lane l names row l % 8 of the (l / 8)-th 8×8 matrix: outputs + 0, + 8, then inputs + 8.
  const int row = place.lane % 8, output = place.lane / 8 % 2 * 8, input = place.lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kRank / 16; ++k) {
    const uint32_t box = SharedAddress(shared.latents[k / 4]) + place.group * kHalfBoxBytes;
    if (is_value) {
      const int piece = (k % 4 * 16 + input) / 8, at = place.warp * 16 + output + row;
      sm90::LoadMatrices<sm90::Matrix::kAsStored>(box + at * 128 + (piece ^ (at & 7)) * 16,
                                                  weights[k]);
    } else {
      const int piece = (place.warp * 16 + output) / 8, at = k % 4 * 16 + input + row;
      sm90::LoadMatrices<sm90::Matrix::kTransposed>(box + at * 128 + (piece ^ (at & 7)) * 16,
                                                    weights[k]);
    }
  }
}

// Sums of 64 outputs and 128 tokens to rows of tokens in shared memory; zeros from `count` on.
__device__ void StageRows(float (&sums)[64], int count, const Place& place, unsigned char* out) {
  if (count < kTile) {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      if (i / 4 * 8 + place.lane % 4 * 2 + i % 2 >= count) sums[i] = 0.0f;
    }
  }
  const int piece = place.warp * 2 + place.lane / 8 % 2;
#pragma unroll
  for (int j = 0; j < 16; j += 2) {
    const int token = (j + place.lane / 16) * 8 + place.lane % 8;
    const uint32_t words[4] = {
        sm90::PackBf16(sums[j * 4], sums[j * 4 + 1]),
        sm90::PackBf16(sums[j * 4 + 2], sums[j * 4 + 3]),
        sm90::PackBf16(sums[j * 4 + 4], sums[j * 4 + 5]),
        sm90::PackBf16(sums[j * 4 + 6], sums[j * 4 + 7]),
    };
    sm90::StoreMatricesTransposed(SharedAddress(out) + token * 128 + (piece ^ (token & 7)) * 16,
                                  words);
  }
}

__device__ void ComputeTiles(const Maps& maps, const Arguments& arguments, const Share& share,
                             int num_key_tiles, const Place& place,
                             const uint32_t (&weights)[kRank / 16][4], SharedMemory& shared) {
  const bool speaks = place.warp == 0 && place.lane == 0;
  // Lane i tells block i of the cluster that what it copies here has been read.
  const auto free_stage = [&](int step, bool used) {
    sm90::BarrierArriveInCluster(&shared.empty[step % kStages], place.lane % kCluster,
                                 place.lane < kCluster && used);
  };
  unsigned char* out = shared.out[place.group];
  int step = 0;
  for (int i = share.first; i < num_key_tiles; i += share.stride) {
    const int count = arguments.tiles[i].count;
    float sums[64];
#pragma unroll
    for (int k = 0; k < kSteps; ++k, ++step) {
      const int stage = step % kStages;
      const uint32_t latents = SharedAddress(shared.latents[stage]);
      BarrierWait(&shared.full[stage], step / kStages & 1);
      sm90::ProductsBegin();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sm90::ProductBf16N128<OperandB::kAsStored>(sums, weights[k * 4 + j],
                                                   TileDescriptor(latents + j * 32), (k | j) != 0);
      }
      sm90::ProductsCommit();
      sm90::ProductsWait<1>();
      free_stage(step + kStages - 1, k > 0);
    }
    sm90::ProductsWait<0>();
    free_stage(step + kStages - 1, true);

    if (speaks) sm90::StoresWaitRead();  // `out` is free
    SyncThreads(kGroup + place.group, 128);
    StageRows(sums, count, place, out);
    sm90::FenceForAsyncProxy();
    SyncThreads(kGroup + place.group, 128);
    if (speaks) {
      sm90::StoreBox(out, share.is_value ? &maps.values : &maps.keys, place.group * 64,
                     share.head * arguments.piece_tokens + i * kTile);
      sm90::StoresCommit();
    }
  }
  if (speaks) sm90::StoresWait();
}

__global__ __launch_bounds__(kThreads, 1) void ExpandKernel(
    const __grid_constant__ CUtensorMap latents, const __grid_constant__ CUtensorMap w_uk,
    const __grid_constant__ CUtensorMap w_uv, const __grid_constant__ CUtensorMap keys,
    const __grid_constant__ CUtensorMap values, const Arguments arguments) {
  extern __shared__ unsigned char dynamic_shared[];
  SharedMemory& shared = sm90::AtFirstTile<SharedMemory>(dynamic_shared);
  const Maps maps = {latents, w_uk, w_uv, keys, values};
  const Share share = MyShare();
  // Blocks beyond whole columns only turn queries.
  const bool has_share = share.first < share.stride;
  const int thread = threadIdx.x;
  if (thread == 0) {
    sm90::BarrierInit(&shared.weights_full, 1);
    for (int i = 0; i < kStages; ++i) {
      sm90::BarrierInit(&shared.full[i], 1);
      sm90::BarrierInit(&shared.empty[i], 8 * kCluster);
    }
    sm90::BarrierInitFence();
    // Weights are nobody's output: they may come while the kernel before runs.
    if (has_share) CopyWeights(maps, share, shared);
  }
  sm90::LetDependentsLaunch();
  __syncwarp();
  sm90::ClusterSyncBare();
  if (thread < 128) {
    sm90::GiveRegisters<40>();
    sm90::WaitForPredecessors();
    const KeyTile first = arguments.tiles[share.first];  // perhaps none: then it is not used
    const int num_key_tiles = arguments.counts->num_key_tiles;
    if (thread < 32) {
      if (has_share) CopyLatents(maps, arguments, share, num_key_tiles, first, thread, shared);
    } else {
      if (arguments.cache != nullptr) CopyRopes(arguments, num_key_tiles, thread - 32, 96);
      if (arguments.query_ropes != nullptr) RotateQueries(arguments, thread - 32, 96);
    }
  } else {
    sm90::TakeRegisters<232>();
    const Place place = {thread / 128 - 1, thread / 32 % 4, thread % 32};
    uint32_t weights[kRank / 16][4];
    if (has_share) {
      BarrierWait(&shared.weights_full, 0);
      LoadWeights(shared, share.is_value, place, weights);
      __syncwarp();
      for (int i = 0; i < kStages; ++i) {
        sm90::BarrierArriveInCluster(&shared.empty[i], place.lane % kCluster,
                                     place.lane < kCluster);
      }
    }
    sm90::WaitForPredecessors();
    const int num_key_tiles = arguments.counts->num_key_tiles;
    if (has_share) {
      ComputeTiles(maps, arguments, share, num_key_tiles, place, weights, shared);
    }
  }
  __syncwarp();
  sm90::ClusterSyncBare();  // nobody ends whom the other may still write to
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
  const MlaCache& cache = expansion.cache;
  const bool paged = cache.type == MlaCacheType::kBf16;
  const int tiles = workspace.piece_tokens / kTile;
  Arguments arguments = {.counts = workspace.counts + piece,
                         .tiles = workspace.key_tiles + int64_t{piece} * tiles,
                         .ropes = workspace.ropes,
                         .piece_tokens = workspace.piece_tokens,
                         .q = expansion.q,
                         .query_ropes = piece == 0 ? workspace.query_ropes : nullptr,
                         .positions = expansion.positions,
                         .cos_sin = expansion.cos_sin,
                         .num_tokens = expansion.num_tokens,
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
  const int64_t rows = int64_t{kHeads} * workspace.piece_tokens;
  const int blocks = num_multiprocessors / kCluster * kCluster;
  CHECK_GE(blocks, kHeads * kCluster);
  cuda::LaunchDependent(ExpandKernel, {dim3(blocks), dim3(kThreads), kSharedBytes, kCluster},
                        stream, latents, MapBf16(expansion.w_uk, kHeads * kRank, kHeadDim, 64),
                        MapBf16(expansion.w_uv, kHeads * kHeadDim, kRank, kTile),
                        MapBf16(workspace.keys, rows, kHeadDim, kTile),
                        MapBf16(workspace.values, rows, kHeadDim, kTile), arguments);
}

}  // namespace fathom::mla_prefill
