// How fp8_tile_sm90.cu's kernels bring a tile of weights and tokens in, stage by stage, and
// multiply it: a thread runs the copy engine (and deals tiles out), a warp multiplies factors, two
// warps gather rows, two warpgroups compute. Everything here is called by all threads of the part
// it belongs to.
#pragma once

#include <type_traits>

#include "kernels/cuda/expert_chunks.h"
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
  // Tiles take so different times, and there are so few for each block, that whoever is free takes
  // the next; which block has computed a tile cannot be seen in it.
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
struct NoQueue {};

template <typename S>
struct SharedMemory {
  alignas(sm90::kTileAlignment) unsigned char weight[S::kStages][S::kWeightBytes];
  alignas(sm90::kTileAlignment) unsigned char x[S::kStages][S::kXBytes];
  alignas(sm90::kTileAlignment) unsigned char out[2][S::kStagingBytes];
  // Token's times weight block's, as PlaceOfFactor orders them.
  alignas(16) float factors[S::kStages][S::kRowBlocks][S::kTokens];
  uint32_t x_offsets[2][S::kGatherThreads > 0 ? S::kTokens : 1];
  uint64_t full[S::kStages], empty[S::kStages];
  std::conditional_t<S::kIsDealt, TileQueue, NoQueue> queue;
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
  int* dealt = nullptr;  // [2] tiles and blocks without one, zero between kernels
};

// --- what is to be done

// The tiles of a worker (a block, or a pair), in order; every part of a block walks them on its
// own.
template <typename S>
class Walk {
 public:
  __device__ explicit Walk(const Arguments& arguments) : arguments_(arguments) {
    at_ = blockIdx.x / S::kPair;
    if constexpr (S::kWork == Work::kDense) {
      constexpr int kPairTokens = S::kTokens * S::kPair;
      columns_ = (arguments.x_rows + kPairTokens - 1) / kPairTokens;
      rows_ = arguments.outputs / S::kRows;
      num_ = whole_ = rows_ * columns_;
      if constexpr (S::kRowBlocks == 1) {
        if (arguments.outputs % S::kRows != 0) num_ += (columns_ + 1) / 2;
      } else {  // as below, a round's worth of halves instead of less than half a round
        const int workers = gridDim.x / S::kPair, last = num_ % workers;
        if (last * 2 <= workers) {
          whole_ -= last;
          num_ += last;
        }
        halves_ = num_;
        if (arguments.outputs % S::kRows != 0) num_ += columns_;
      }
    } else {
      rows_ = (arguments.outputs + S::kRows * S::kPair - 1) / (S::kRows * S::kPair);
      num_chunks_ = arguments.notes[0];
      whole_ = num_ = num_chunks_ * rows_;
      // If the last round would leave more than half of the blocks idle, two share a tile.
      const int last = num_ % static_cast<int>(gridDim.x);
      if (S::kRowBlocks == 2 && last * 2 <= static_cast<int>(gridDim.x)) {
        whole_ -= last;
        num_ += last;
      }
      if constexpr (!S::kIsDealt) LoadChunk();
    }
  }

  // Of tiles that are dealt: number `at` of all.
  __device__ bool At(int at, Tile& tile) {
    at_ = at;
    LoadChunk();
    return Next(tile);
  }
  __device__ bool Next(Tile& tile) {
    if (at_ >= num_) return false;
    if constexpr (S::kWork == Work::kDense) {
      NextDense(tile);
    } else {
      const int rank = S::kPair > 1 ? sm90::ClusterRank() : 0;
      tile = {ahead_.x, (Item() % rows_ * S::kPair + rank) * S::kRows, ahead_.y, ahead_.z,
              at_ >= whole_};
      if (tile.narrow) tile.row += (at_ - whole_) % 2 * (S::kRows / 2);
      if constexpr (!S::kIsDealt) {
        at_ += static_cast<int>(gridDim.x) / S::kPair;
        LoadChunk();
      }
    }
    return true;
  }

 private:
  // Tokens run fastest, so that the blocks at work share weights, but not past what the L2 holds.
  __device__ void NextDense(Tile& tile) {
    constexpr int kGroup = 8;
    const int workers = gridDim.x / S::kPair;
    int row = rows_, column, half = 0;
    tile.narrow = at_ >= whole_;
    if (!tile.narrow || (S::kRowBlocks == 2 && at_ < halves_)) {
      const int item = Item();
      const int group = item / (rows_ * kGroup);
      const int in_group = item - group * rows_ * kGroup;
      const int width = min(kGroup, columns_ - group * kGroup);
      row = in_group / width;
      column = group * kGroup + in_group % width;
      if (tile.narrow) half = (at_ - whole_) % 2;
      at_ += workers;
    } else if (S::kRowBlocks == 2) {  // the last 128 weight rows
      column = at_ - halves_;
      at_ += workers;
    } else {  // two of the last 64 weight rows take as long as another tile
      column = (at_ - whole_) * 2 + second_;
      second_ ^= 1;
      if (second_ == 0 || column + 1 >= columns_) at_ += workers;
    }
    const int rank = S::kPair > 1 ? sm90::ClusterRank() : 0;
    tile.expert = 0;
    tile.row = row * S::kRows + half * kBlock;
    tile.token = (column * S::kPair + rank) * S::kTokens;
    tile.count = max(0, min(S::kTokens, arguments_.x_rows - tile.token));
  }
  __device__ int Item() const { return at_ < whole_ ? at_ : whole_ + (at_ - whole_) / 2; }
  // The last chunks first: those of the shared expert take longest.
  __device__ void LoadChunk() {
    if (at_ < num_) {
      const int chunk = num_chunks_ - 1 - Item() / rows_;
      ahead_ = *reinterpret_cast<const int4*>(arguments_.notes + kFirstChunkNote + 4 * chunk);
    }
  }

  const Arguments& arguments_;
  int at_, num_, whole_;  // items before `whole_` have all weight rows
  int rows_, columns_ = 0, second_ = 0, num_chunks_ = 0, halves_ = 0;
  int4 ahead_ = {};
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

// How a warp gets the tiles of a block, and the copying thread deals them out.
template <typename S>
class Tiles {
 public:
  static constexpr int kTakers = kConsumers / 32 + 1 + S::kGatherThreads / 32;  // warps

  __device__ Tiles(const Arguments& arguments, SharedMemory<S>& shared)
      : arguments_(arguments), shared_(shared), walk_(arguments) {}

  // All threads of a warp.
  __device__ bool Take(Tile& tile) {
    if constexpr (S::kIsDealt) {
      TileQueue& queue = shared_.queue;
      BarrierWait(&queue.full[place_.stage], place_.phase);
      tile = queue.tiles[place_.stage];
      __syncwarp();
      sm90::BarrierArriveIf(&queue.empty[place_.stage], threadIdx.x % 32 == 0);
      place_.Advance();
      return tile.expert >= 0;
    } else {
      return walk_.Next(tile);
    }
  }
  // The copying thread, which is far enough ahead of the others to ask for the next tile only when
  // it needs it.
  __device__ bool Deal(Tile& tile) {
    if constexpr (S::kIsDealt) {
      TileQueue& queue = shared_.queue;
      BarrierWait(&queue.empty[place_.stage], place_.phase ^ 1);
      int at = blockIdx.x;
      if (!is_first_) at = gridDim.x + atomicAdd(&arguments_.dealt[0], 1);
      is_first_ = false;
      const bool exists = walk_.At(at, tile);
      if (!exists) {
        tile.expert = -1;
        if (atomicAdd(&arguments_.dealt[1], 1) == static_cast<int>(gridDim.x) - 1) {
          arguments_.dealt[0] = arguments_.dealt[1] = 0;  // nobody will ask any more
        }
      }
      queue.tiles[place_.stage] = tile;
      sm90::BarrierArriveIf(&queue.full[place_.stage], true);
      place_.Advance();
      return exists;
    } else {
      return walk_.Next(tile);
    }
  }

 private:
  const Arguments& arguments_;
  SharedMemory<S>& shared_;
  Walk<S> walk_;
  Ring<TileQueue::kTiles> place_;
  bool is_first_ = true;
};

// Which blocks of 128 inputs.
struct Span {
  int begin, end;
};

// --- the copying thread

template <typename S>
__device__ void CopyWeight(const CUtensorMap& map, const Arguments& arguments, const Tile& tile,
                           int k, int stage, uint64_t policy, SharedMemory<S>& shared) {
  const int row = tile.expert * arguments.outputs + tile.row;
  if constexpr (S::kWork == Work::kDense) {  // either block brings half of it for both
    const int rank = sm90::ClusterRank();
    const int boxes = S::kRowBlocks == 2 && !tile.narrow ? 2 : 1;
    for (int b = 0; b < boxes; ++b) {
      const int half = rank * boxes + b;
      sm90::CopyBoxToCluster(shared.weight[stage] + half * (S::kBoxBytes / 2), &map, k * kBlock,
                             row + half * kHalf, &shared.full[stage], 3, policy);
    }
  } else {
#pragma unroll
    for (int b = 0; b < S::kRowBlocks; ++b) {
      if (b > 0 && tile.narrow) break;
      sm90::CopyBox(shared.weight[stage] + b * S::kBoxBytes, &map, k * kBlock, row + b * kBlock,
                    &shared.full[stage], policy);
    }
  }
}

// `ahead`: how many of the first stages' weights are on their way already.
template <typename S>
__device__ void CopyTile(const CUtensorMap& weight_map, const CUtensorMap& x_map,
                         const Arguments& arguments, const Tile& tile, Span span, int ahead,
                         uint64_t policy, Ring<S::kStages>& ring, SharedMemory<S>& shared) {
  const int boxes = S::kWork == Work::kSorted ? (tile.count + S::kXBoxRows - 1) / S::kXBoxRows : 1;
  const int x_bytes =
      S::kWork == Work::kGathered ? 0 : boxes * S::kXBoxRows * sm90::kSwizzledRowBytes;
  const int weight_bytes = S::kRowBlocks == 2 && tile.narrow ? S::kBoxBytes : S::kWeightBytes;
  for (int k = span.begin; k < span.end; ++k) {
    uint64_t* full = &shared.full[ring.stage];
    BarrierWait(&shared.empty[ring.stage], ring.phase ^ 1);
    sm90::BarrierExpectBytes(full, weight_bytes + x_bytes);
    if (k >= span.begin + ahead) {
      CopyWeight(weight_map, arguments, tile, k, ring.stage, policy, shared);
    }
    if constexpr (S::kWork == Work::kSorted) {
      for (int b = sm90::ClusterRank(); b < boxes; b += S::kPair) {
        sm90::CopyBoxToCluster(shared.x[ring.stage] + b * S::kXBoxRows * sm90::kSwizzledRowBytes,
                               &x_map, k * kBlock, tile.token + b * S::kXBoxRows, full, 3,
                               sm90::EvictLastPolicy());
      }
    } else if constexpr (S::kWork != Work::kGathered) {
      for (int b = 0; b < boxes; ++b) {
        sm90::CopyBox(shared.x[ring.stage] + b * S::kXBoxRows * sm90::kSwizzledRowBytes, &x_map,
                      k * kBlock, tile.token + b * S::kXBoxRows, full, sm90::EvictLastPolicy());
      }
    }
    ring.Advance();
  }
}

// Weights may be read before the kernels before this one have ended.
template <typename S>
__device__ int CopyFirstWeights(const CUtensorMap& map, const Arguments& arguments,
                                const Tile& tile, Span span, uint64_t policy,
                                SharedMemory<S>& shared) {
  const int num = min(S::kStages, span.end - span.begin);
  for (int i = 0; i < num; ++i) {
    CopyWeight(map, arguments, tile, span.begin + i, i, policy, shared);
  }
  return num;
}

// --- the warp that multiplies factors

// Where token t's factor stands, so that a consumer reads four at once: those of its columns in two
// neighbouring groups of eight tokens.
__device__ constexpr int PlaceOfFactor(int t) {
  return t / 16 * 16 + t % 8 / 2 * 4 + t / 8 % 2 * 2 + t % 2;
}

template <typename S>
__device__ void MultiplyFactors(const Arguments& arguments, const Tile& tile, Span span, int lane,
                                Ring<S::kStages>& ring, SharedMemory<S>& shared) {
  constexpr int kEach = 4;  // tokens of a lane
  constexpr int kAhead = 2;
  uint32_t scales[kEach];  // where they begin
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int t = lane * kEach + i;
    int row = tile.token + min(t, max(tile.count - 1, 0));
    if (S::kWork == Work::kGathered) row = arguments.rows[row] / arguments.divisor;
    if (S::kPair > 1) row = min(row, arguments.x_rows - 1);
    scales[i] = row * arguments.x_scales_stride;
  }
  const int blocks = (arguments.outputs + kBlock - 1) / kBlock;
  const int block = min(tile.row / kBlock, blocks - 1);
  const float* weight =
      arguments.factors + (int64_t{tile.expert} * blocks + block) * arguments.k_blocks;
  const int next_block = block + 1 < blocks ? arguments.k_blocks : 0;
  float next[kAhead][kEach], next_weight[kAhead][S::kRowBlocks];
  const auto load = [&](int k) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int at = min(k + a, span.end - 1);
#pragma unroll
      for (int i = 0; i < kEach; ++i) next[a][i] = arguments.x_scales[scales[i] + at];
#pragma unroll
      for (int b = 0; b < S::kRowBlocks; ++b) next_weight[a][b] = weight[b * next_block + at];
    }
  };
  load(span.begin);
  for (int k = span.begin; k < span.end; k += kAhead) {
    float2 products[kAhead][S::kRowBlocks][2];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
#pragma unroll
      for (int b = 0; b < S::kRowBlocks; ++b) {
        const float w = next_weight[a][b];
        products[a][b][0] = make_float2(next[a][0] * w, next[a][1] * w);
        products[a][b][1] = make_float2(next[a][2] * w, next[a][3] * w);
      }
    }
    load(k + kAhead);
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (k + a >= span.end) break;
      BarrierWait(&shared.empty[ring.stage], ring.phase ^ 1);
      if (lane * kEach < S::kTokens) {
#pragma unroll
        for (int b = 0; b < S::kRowBlocks; ++b) {
          float* target = shared.factors[ring.stage][b];
          constexpr int kSecond = S::kTokensFirst ? 2 : 4;
          target += S::kTokensFirst ? lane * kEach : PlaceOfFactor(lane * kEach);
          *reinterpret_cast<float2*>(target) = products[a][b][0];
          *reinterpret_cast<float2*>(target + kSecond) = products[a][b][1];
        }
      }
      // Each lane for itself: racecheck does not see that one could arrive for all after
      // __syncwarp.
      sm90::BarrierArriveIf(&shared.full[ring.stage], true);
      ring.Advance();
    }
  }
}

// --- the threads that gather rows

template <typename S>
__device__ void GatherTile(const Arguments& arguments, const Tile& tile, Span span, int thread,
                           int buffer, Ring<S::kStages>& ring, SharedMemory<S>& shared) {
  constexpr int kPieces = 8;  // of 16 bytes
  constexpr int kRowsAtOnce = S::kGatherThreads / kPieces;
  static_assert(kRowsAtOnce == 8);
  uint32_t* offsets = shared.x_offsets[buffer];
  for (int t = thread; t < tile.count; t += S::kGatherThreads) {
    offsets[t] = static_cast<uint32_t>(arguments.rows[tile.token + t] / arguments.divisor *
                                       arguments.x_stride);
  }
  SyncThreads(3, S::kGatherThreads);
  const int piece = thread % kPieces, first = thread / kPieces;
  const int place = first * sm90::kSwizzledRowBytes + (piece ^ first) * 16;
  for (int k = span.begin; k < span.end; ++k) {
    BarrierWait(&shared.empty[ring.stage], ring.phase ^ 1);
    const unsigned char* source = arguments.x + k * kBlock + piece * 16;
    const uint32_t target = SharedAddress(shared.x[ring.stage]) + place;
#pragma unroll 8
    for (int t = first; t < tile.count; t += kRowsAtOnce) {
      sm90::CopySixteen(target + (t - first) * sm90::kSwizzledRowBytes, source + offsets[t]);
    }
    sm90::BarrierArriveAfterCopies(&shared.full[ring.stage]);
    ring.Advance();
  }
}

// --- the warpgroups that compute

struct Place {
  int group, thread, warp, lane;  // thread and warp of the warpgroup
};

// How many floats a thread holds of 64 weight rows × kN tokens.
template <int kN>
inline constexpr int kFloats = kN / 2;

// total += sums · factors, for kN tokens; `early` holds the first kEarly groups of 16 factors.
template <int kN, int kEarly>
__device__ void AddProducts(const float (&sums)[kFloats<kN>], const float4* early,
                            const float* factors, float (&total)[kFloats<kN>]) {
#pragma unroll
  for (int j = 0; j < kN / 16; ++j) {
    const float4 f = j < kEarly ? early[j] : *reinterpret_cast<const float4*>(factors + j * 16);
    const int i = 8 * j;
    total[i + 0] += sums[i + 0] * f.x;
    total[i + 1] += sums[i + 1] * f.y;
    total[i + 2] += sums[i + 2] * f.x;
    total[i + 3] += sums[i + 3] * f.y;
    total[i + 4] += sums[i + 4] * f.z;
    total[i + 5] += sums[i + 5] * f.w;
    total[i + 6] += sums[i + 6] * f.z;
    total[i + 7] += sums[i + 7] * f.w;
  }
}

// sums = 64 rows of a stage's weights · its tokens, begun and committed as a group.
template <int kN>
__device__ void BeginProducts(uint32_t weight, uint32_t x, float (&sums)[kFloats<kN>]) {
  sm90::ProductsBegin();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sm90::ProductFp8<kN>(sums, TileDescriptor(weight + i * 32), TileDescriptor(x + i * 32), i > 0);
  }
  sm90::ProductsCommit();
}

// One warpgroup's view of the stages.
template <typename S>
struct Stages {
  const Place& place;
  SharedMemory<S>& shared;
  Ring<S::kStages>& ring;
  int factor_block;  // of the tile, that the warpgroup's weight rows belong to

  __device__ void Wait() {
    BarrierWait(&shared.full[ring.stage], ring.phase);
    if constexpr (S::kWork == Work::kGathered) sm90::FenceForAsyncProxy();
  }
  __device__ void Free(int stage) {
    if constexpr (S::kPair == 2) {
      sm90::BarrierArriveInCluster(&shared.empty[stage], place.lane & 1, place.lane < 2);
    } else {
      sm90::BarrierArriveIf(&shared.empty[stage], place.lane == 0);
    }
  }
  __device__ uint32_t weight(int half) const {
    return SharedAddress(shared.weight[ring.stage]) + half * (kHalf * sm90::kSwizzledRowBytes);
  }
  __device__ uint32_t x(int half = 0) const {
    return SharedAddress(shared.x[ring.stage]) + half * (kHalf * sm90::kSwizzledRowBytes);
  }
  __device__ const float* factors(int stage) const {
    return shared.factors[stage][factor_block] + place.lane % 4 * 4;
  }
};

// total = Σ over the span's blocks: products · factors. 64 weight rows of a warpgroup.
template <typename S, int kN>
__device__ void MultiplyHalf(Span span, Stages<S> stages, float (&total)[kFloats<kN>]) {
  for (int k = span.begin; k < span.end; ++k) {
    float sums[kFloats<kN>];
    float4 early[kN / 16];
    stages.Wait();
    BeginProducts<kN>(stages.weight(stages.place.group), stages.x(), sums);
    const float* factors = stages.factors(stages.ring.stage);
#pragma unroll
    for (int j = 0; j < kN / 16; ++j) early[j] = *reinterpret_cast<const float4*>(factors + j * 16);
    sm90::ProductsWait<0>();
    stages.Free(stages.ring.stage);
    AddProducts<kN, kN / 16>(sums, early, factors, total);
    stages.ring.Advance();
  }
}

// The same of 64 tokens of a warpgroup by kN weight rows: while the products of one block run,
// those of the block before are added up.
template <typename S, int kN>
__device__ void MultiplyTokens(Span span, Stages<S> stages, float (&total)[kFloats<kN>]) {
  const Place& place = stages.place;
  const int token = place.group * kHalf + place.warp * 16 + place.lane / 4;
  float sums[kFloats<kN>], others[kFloats<kN>];
  int before = 0;
  const auto begin = [&](float(&to)[kFloats<kN>]) {
    stages.Wait();
    BeginProducts<kN>(stages.x(place.group), stages.weight(0), to);
  };
  const auto advance = [&] {
    before = stages.ring.stage;
    stages.ring.Advance();
  };
  // The products of block `before`, which are done when kPending others still run.
  const auto add = [&]<int kPending>(float(&from)[kFloats<kN>]) {
    const float* factors = stages.shared.factors[before][0] + token;
    const float f0 = factors[0], f1 = factors[8];
    sm90::ProductsWait<kPending>();
    stages.Free(before);
#pragma unroll
    for (int i = 0; i < kFloats<kN>; ++i) total[i] += from[i] * (i / 2 % 2 == 0 ? f0 : f1);
  };
  begin(sums);
  advance();
  for (int left = span.end - span.begin - 1; true; left -= 2) {
    if (left == 0) {
      add.template operator()<0>(sums);
      return;
    }
    begin(others);
    add.template operator()<1>(sums);
    advance();
    if (left == 1) {
      add.template operator()<0>(others);
      return;
    }
    begin(sums);
    add.template operator()<1>(others);
    advance();
  }
}

// The same of 64 tokens by two blocks of 128 weight rows, one after the other.
template <typename S>
__device__ void MultiplyTokensWide(Span span, Stages<S> stages,
                                   float (&total)[2][kFloats<kBlock>]) {
  const Place& place = stages.place;
  const int token = place.group * kHalf + place.warp * 16 + place.lane / 4;
  for (int k = span.begin; k < span.end; ++k) {
    const int stage = stages.ring.stage;
    stages.Wait();
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      float sums[kFloats<kBlock>];
      const float* factors = stages.shared.factors[stage][b] + token;
      const float f0 = factors[0], f1 = factors[8];
      BeginProducts<kBlock>(stages.x(place.group), stages.weight(2 * b), sums);
      sm90::ProductsWait<0>();
      if (b == 1) stages.Free(stage);
#pragma unroll
      for (int i = 0; i < kFloats<kBlock>; ++i) total[b][i] += sums[i] * (i / 2 % 2 == 0 ? f0 : f1);
    }
    stages.ring.Advance();
  }
}

// 128 rows of a warpgroup: while one half's sums are added up, the other's products run.
template <typename S, int kN>
__device__ void MultiplyBlock(Span span, Stages<S> stages, float (&total)[2][kFloats<kN>]) {
  constexpr int kSums = kN <= 96 ? 2 : 1;  // as registers allow
  constexpr int kEarly = kN <= 64 ? kN / 16 : 2;
  for (int k = span.begin; k < span.end; ++k) {
    float sums[kSums][kFloats<kN>];
    float4 early[kEarly];
    const int first = stages.place.group * 2;
    const float* factors = stages.factors(stages.ring.stage);
    stages.Wait();
    BeginProducts<kN>(stages.weight(first), stages.x(), sums[0]);
    if constexpr (kSums == 2) {
      BeginProducts<kN>(stages.weight(first + 1), stages.x(), sums[1]);
    }
#pragma unroll
    for (int j = 0; j < kEarly; ++j) early[j] = *reinterpret_cast<const float4*>(factors + j * 16);
    sm90::ProductsWait<kSums - 1>();
    AddProducts<kN, kEarly>(sums[0], early, factors, total[0]);
    if constexpr (kSums == 1) BeginProducts<kN>(stages.weight(first + 1), stages.x(), sums[0]);
    sm90::ProductsWait<0>();
    if constexpr (kEarly == kN / 16) stages.Free(stages.ring.stage);
    AddProducts<kN, kEarly>(sums[kSums - 1], early, factors, total[1]);
    if constexpr (kEarly < kN / 16) stages.Free(stages.ring.stage);
    stages.ring.Advance();
  }
}

// kRowBlocks · 64 weight rows of a warpgroup, 64 of a narrow tile.
template <typename S, int kN, int kHalves>
__device__ void MultiplyTile(Span span, const Place& place, Ring<S::kStages>& ring,
                             SharedMemory<S>& shared, float (&total)[kHalves][kFloats<kN>]) {
#pragma unroll
  for (int b = 0; b < kHalves; ++b) {
#pragma unroll
    for (int i = 0; i < kFloats<kN>; ++i) total[b][i] = 0.0f;
  }
  const Stages<S> stages = {place, shared, ring, kHalves == 2 ? place.group : 0};
  if constexpr (S::kTokensFirst && kHalves == 2) {
    MultiplyTokensWide<S>(span, stages, total);
  } else if constexpr (S::kTokensFirst) {
    MultiplyTokens<S, kN>(span, stages, total[0]);
  } else if constexpr (kHalves == 2) {
    MultiplyBlock<S, kN>(span, stages, total);
  } else {
    MultiplyHalf<S, kN>(span, stages, total[0]);
  }
}

}  // namespace fathom::fp8_tile
