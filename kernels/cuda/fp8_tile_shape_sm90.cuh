// What fp8_tile_sm90.cu's kernels are made for and share: shapes, the memory of a block, arguments.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/sm90.cuh"

namespace fathom::fp8_tile {

using sm90::BarrierWait;
using sm90::SharedAddress;
using sm90::SyncThreads;
using sm90::TileDescriptor;

constexpr int kBlock = 128;      // inputs between promotions; weight rows of a factor
constexpr int kHalf = 64;        // weight rows of one product
constexpr int kConsumers = 256;  // two warpgroups
constexpr int kPassTokens = 64;  // that go through shared memory at once on the way out

enum class Work {
  kDense,     // token t is row t; tiles enough for all blocks, which come in pairs
  kSplit,     // the blocks of a cluster share a tile's inputs
  kSorted,    // chunks of rows of one expert
  kGathered,  // the same, from anywhere in x
};

// What a kernel is made for: tiles of 128 · kRowBlocks weight rows by at most kTokens tokens.
template <Work kWork_, int kRowBlocks_, int kTokens_, int kStages_>
struct Shape {
  static constexpr Work kWork = kWork_;
  static constexpr int kRowBlocks = kRowBlocks_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kStages = kStages_;
  static constexpr int kRows = kBlock * kRowBlocks;
  static_assert(kWork != Work::kSorted || kRowBlocks == 1);
  // Which side of the products is the long one, 64 rows for each warpgroup. Weights: any number of
  // tokens will do. Tokens: a thread sees two of them and needs but two factors.
  static constexpr bool kTokensFirst =
      kWork == Work::kDense || (kWork == Work::kSplit && kTokens == 128);
  // Two blocks with the same weight rows (dense) or the same tokens (sorted), each of which brings
  // half of them for both.
  static constexpr int kPair = kWork == Work::kDense || kWork == Work::kSorted ? 2 : 1;
  // Finding the next chunk takes long: one thread does it ahead for all that work on its tile.
  static constexpr bool kIsQueued = kWork == Work::kSorted || kWork == Work::kGathered;
  // Tiles take so different times, and there are so few for each block, that whoever is free takes
  // another; which block has computed a tile cannot be seen in it.
  static constexpr bool kIsDealt = kWork == Work::kGathered;
  static constexpr int kGatherThreads = kWork == Work::kGathered ? 64 : 0;
  static constexpr bool kMovesRegisters = kTokens == 128;
  // One warp runs the copy engine, one multiplies factors, two gather.
  static constexpr int kProducers = kMovesRegisters || kGatherThreads > 0 ? 128 : 64;
  static constexpr int kThreads = kConsumers + kProducers;
  static constexpr int kBoxBytes = kBlock * sm90::kSwizzledRowBytes;
  static constexpr int kWeightBytes = kRowBlocks * kBoxBytes;
  static constexpr int kXBytes = kTokens * sm90::kSwizzledRowBytes;
  static constexpr int kXBoxRows = kWork == Work::kSorted ? 16 : kTokens;
  // Of a warpgroup's output.
  static constexpr int kStagingBytes = kWork == Work::kSplit                      ? 16
                                       : kWork == Work::kDense && kRowBlocks == 1 ? kBoxBytes
                                                                                  : kBoxBytes / 2;
};

struct Tile {
  int expert;
  int row;      // first weight row, of the expert's
  int token;    // first row of the output
  int count;    // of tokens, at most kTokens; may be none
  bool narrow;  // with half as many weight rows
};

// Tiles on their way from the copying thread to the warps that work on them.
struct TileQueue {
  static constexpr int kTiles = 4;
  Tile tiles[kTiles];  // no expert: there are no more
  uint64_t full[kTiles], empty[kTiles];
};
struct Nothing {};

struct KnownChunk {
  int expert;
  int begin;
  int count;
};
constexpr int kMostKnown = 768;  // chunks that are kept in shared memory; more are not sorted

template <typename S>
struct SharedMemory {
  alignas(sm90::kTileAlignment) unsigned char weight[S::kStages][S::kWeightBytes];
  alignas(sm90::kTileAlignment) unsigned char x[S::kStages][S::kXBytes];
  alignas(sm90::kTileAlignment) unsigned char out[2][S::kStagingBytes];
  // Token's times weight block's, as PlaceOfFactor orders them.
  alignas(16) float factors[S::kStages][S::kRowBlocks][S::kTokens];
  uint32_t x_offsets[2][S::kGatherThreads > 0 ? S::kTokens : 1];
  uint64_t full[S::kStages], empty[S::kStages];
  std::conditional_t<S::kIsQueued, TileQueue, Nothing> queue;
  std::conditional_t<S::kIsQueued, KnownChunk[kMostKnown], Nothing> chunks;
};

// Of tiles that are dealt out, zero between kernels.
struct Dealt {
  unsigned long long taken;  // from the front; times 2³²: from the back
  int finished;              // blocks
};

struct Arguments {
  const float* x_scales = nullptr;
  int x_scales_stride = 0;
  const unsigned char* x = nullptr;
  int64_t x_stride = 0;
  int x_rows = 0;
  const float* factors = nullptr;
  int outputs = 0, k_blocks = 0;
  const int* notes = nullptr;
  const int* rows = nullptr;
  int divisor = 0;
  int splits = 0;  // blocks of a cluster that share a tile's inputs
  __nv_bfloat16* out = nullptr;
  int64_t out_stride = 0;
  Dealt* dealt = nullptr;
};

// The stages in turn. A stage's k-th use is phase k.
template <int kStages>
struct Ring {
  int stage = 0, phase = 0;
  __device__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace fathom::fp8_tile
