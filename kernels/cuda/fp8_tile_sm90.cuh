// How fp8_tile_sm90.cu's kernels bring a tile of weights and tokens in, stage by stage, and
// multiply it: a thread runs the copy engine (and hands tiles out), a warp multiplies factors, two
// warps gather rows, two warpgroups compute. Everything here is called by all threads of the part
// it belongs to.
#pragma once

#include "kernels/cuda/fp8_tile_shape_sm90.cuh"
#include "kernels/cuda/fp8_tile_tiles_sm90.cuh"
#include "kernels/cuda/sm90.cuh"

namespace fathom::fp8_tile {

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

// Factors of some blocks of a tile, on their way: of four tokens to a lane, and of weight blocks.
template <typename S>
struct Factors {
  static constexpr int kEach = 4;
  static constexpr int kBlocks = 2;
  float x[kBlocks][kEach], weight[kBlocks][S::kRowBlocks];

  // Of block `block`, to the stage of the ring. All lanes.
  __device__ void Store(int block, int lane, Ring<S::kStages>& ring,
                        SharedMemory<S>& shared) const {
    BarrierWait(&shared.empty[ring.stage], ring.phase ^ 1);
    if (lane * kEach < S::kTokens) {
#pragma unroll
      for (int b = 0; b < S::kRowBlocks; ++b) {
        const float w = weight[block][b];
        float* target = shared.factors[ring.stage][b];
        constexpr int kSecond = S::kTokensFirst ? 2 : 4;
        target += S::kTokensFirst ? lane * kEach : PlaceOfFactor(lane * kEach);
        *reinterpret_cast<float2*>(target) = make_float2(x[block][0] * w, x[block][1] * w);
        *reinterpret_cast<float2*>(target + kSecond) =
            make_float2(x[block][2] * w, x[block][3] * w);
      }
    }
    // Each lane for itself: racecheck does not see that one could arrive for all after
    // __syncwarp.
    sm90::BarrierArriveIf(&shared.full[ring.stage], true);
    ring.Advance();
  }
};

// Where a tile's factors are.
template <typename S>
class FactorReader {
 public:
  __device__ FactorReader(const Arguments& arguments, const Tile& tile, int lane)
      : arguments_(arguments) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int t = lane * kEach + i;
      int row = tile.token + min(t, max(tile.count - 1, 0));
      if (S::kWork == Work::kGathered) row = arguments.rows[row] / arguments.divisor;
      if (S::kPair > 1) row = min(row, arguments.x_rows - 1);
      scales_[i] = row * arguments.x_scales_stride;
    }
    const int blocks = (arguments.outputs + kBlock - 1) / kBlock;
    const int block = min(tile.row / kBlock, blocks - 1);
    weight_ = arguments.factors + (int64_t{tile.expert} * blocks + block) * arguments.k_blocks;
    next_block_ = block + 1 < blocks ? arguments.k_blocks : 0;
  }
  // Blocks from k on; behind the last one it again.
  __device__ void Load(int k, int end, Factors<S>& to) const {
#pragma unroll
    for (int a = 0; a < Factors<S>::kBlocks; ++a) {
      const int at = min(k + a, end - 1);
#pragma unroll
      for (int i = 0; i < kEach; ++i) to.x[a][i] = arguments_.x_scales[scales_[i] + at];
#pragma unroll
      for (int b = 0; b < S::kRowBlocks; ++b) to.weight[a][b] = weight_[b * next_block_ + at];
    }
  }

 private:
  static constexpr int kEach = Factors<S>::kEach;

  const Arguments& arguments_;
  uint32_t scales_[kEach];  // where they begin
  const float* weight_;
  int next_block_;
};

template <typename S>
__device__ void MultiplyFactors(const Arguments& arguments, const Tile& tile, Span span, int lane,
                                Ring<S::kStages>& ring, SharedMemory<S>& shared) {
  constexpr int kBlocks = Factors<S>::kBlocks;
  const FactorReader<S> reader(arguments, tile, lane);
  Factors<S> next;
  reader.Load(span.begin, span.end, next);
  for (int k = span.begin; k < span.end; k += kBlocks) {
    const Factors<S> factors = next;
    reader.Load(k + kBlocks, span.end, next);
#pragma unroll
    for (int a = 0; a < kBlocks; ++a) {
      if (k + a >= span.end) break;
      factors.Store(a, lane, ring, shared);
    }
  }
}

// Of all tiles of sorted rows, on its own. Those of tiles with few blocks are asked for three tiles
// before they are handed on.
template <typename S>
__device__ void MultiplySortedFactors(const Arguments& arguments, Span span, int lane,
                                      Ring<S::kStages>& ring, SharedMemory<S>& shared) {
  SortedTiles<S> tiles(arguments, shared);
  if (arguments.k_blocks > Factors<S>::kBlocks) {
    Tile tile;
    while (tiles.Next(tile)) MultiplyFactors(arguments, tile, span, lane, ring, shared);
    return;
  }
  constexpr int kAhead = 3;
  Factors<S> factors[kAhead];
  bool exists[kAhead];
  const auto ask = [&](int i) {
    Tile tile;
    exists[i] = tiles.Next(tile);
    if (exists[i]) FactorReader<S>(arguments, tile, lane).Load(0, arguments.k_blocks, factors[i]);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) ask(i);
  while (true) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (!exists[i]) return;
#pragma unroll
      for (int a = 0; a < Factors<S>::kBlocks; ++a) {
        if (a < arguments.k_blocks) factors[i].Store(a, lane, ring, shared);
      }
      ask(i);
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
