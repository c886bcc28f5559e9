// Which tiles a block of fp8_tile_sm90.cu computes: in order, chunk by chunk, or dealt out; and how
// the thread that knows hands them on.
#pragma once

#include <type_traits>

#include "kernels/cuda/expert_chunks.h"
#include "kernels/cuda/fp8_tile_shape_sm90.cuh"

namespace fathom::fp8_tile {

// The tiles of a pair, in order; every part of its blocks walks on its own.
template <typename S>
class DenseTiles {
 public:
  __device__ DenseTiles(const Arguments& arguments, const SharedMemory<S>&)
      : arguments_(arguments), at_(blockIdx.x / S::kPair) {
    constexpr int kPairTokens = S::kTokens * S::kPair;
    columns_ = (arguments.x_rows + kPairTokens - 1) / kPairTokens;
    rows_ = arguments.outputs / S::kRows;
    num_ = whole_ = rows_ * columns_;
    if constexpr (S::kRowBlocks == 1) {
      if (arguments.outputs % S::kRows != 0) num_ += (columns_ + 1) / 2;
    } else {  // a round's worth of halves instead of less than half a round
      const int workers = gridDim.x / S::kPair, last = num_ % workers;
      if (last * 2 <= workers) {
        whole_ -= last;
        num_ += last;
      }
      halves_ = num_;
      if (arguments.outputs % S::kRows != 0) num_ += columns_;
    }
  }

  // Tokens run fastest, so that the blocks at work share weights, but not past what the L2 holds.
  __device__ bool Next(Tile& tile) {
    if (at_ >= num_) return false;
    constexpr int kGroup = 8;
    const int workers = gridDim.x / S::kPair;
    int row = rows_, column, half = 0;
    tile.narrow = at_ >= whole_;
    if (!tile.narrow || (S::kRowBlocks == 2 && at_ < halves_)) {
      const int item = at_ < whole_ ? at_ : whole_ + (at_ - whole_) / 2;
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
    return true;
  }

 private:
  const Arguments& arguments_;
  int at_, num_, whole_;  // items before `whole_` have all weight rows
  int rows_, columns_, second_ = 0, halves_ = 0;
};

// --- chunks

// The last chunks first: those of the shared expert take longest. All threads.
template <typename S>
__device__ void LoadChunks(const Arguments& arguments, SharedMemory<S>& shared) {
  const int num = arguments.notes[0];
  if (num > kMostKnown) return;
  for (int i = threadIdx.x; i < num; i += S::kThreads) {
    const int4 chunk = reinterpret_cast<const int4*>(arguments.notes + kFirstChunkNote)[i];
    shared.chunks[num - 1 - i] = KnownChunk{chunk.x, chunk.y, chunk.z};
  }
  __syncthreads();
}

// By falling size, in steps of 16 rows, otherwise as they stand. All threads.
template <typename S>
__device__ void SortChunks(const Arguments& arguments, SharedMemory<S>& shared) {
  constexpr int kSizes = S::kTokens / 16, kWarps = S::kThreads / 32;
  constexpr int kRounds = kMostKnown / S::kThreads;
  static_assert(kMostKnown % S::kThreads == 0);
  static_assert(sizeof(shared.out) >= (kRounds * kWarps + 1) * kSizes * sizeof(int));
  const int num = arguments.notes[0];
  if (num > kMostKnown) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // How many of a size a warp has in a round; later, how many stand before those.
  auto* counts = reinterpret_cast<int(*)[kSizes]>(shared.out);
  int* larger = counts[kRounds * kWarps];  // chunks of larger sizes
  int4 chunks[kRounds];
  int sizes[kRounds], places[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int i = r * S::kThreads + static_cast<int>(threadIdx.x);
    sizes[r] = -1;
    if (i < num) {
      chunks[r] = reinterpret_cast<const int4*>(arguments.notes + kFirstChunkNote)[i];
      sizes[r] = (chunks[r].z - 1) / 16;
    }
  }
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    int* own = counts[r * kWarps + warp];
    const unsigned alike = __match_any_sync(~0u, sizes[r]);
    places[r] = __popc(alike & ((1u << lane) - 1));
    if (lane < kSizes) own[lane] = 0;
    __syncwarp();
    if (sizes[r] >= 0 && places[r] == 0) own[sizes[r]] = __popc(alike);
  }
  __syncthreads();
  if (warp == 0) {
    int total = 0, before = 0;
    if (lane < kSizes) {
#pragma unroll 4
      for (int j = 0; j < kRounds * kWarps; ++j) {
        const int count = counts[j][lane];
        counts[j][lane] = total;
        total += count;
      }
    }
#pragma unroll
    for (int s = 1; s < kSizes; ++s) {
      const int other = __shfl_down_sync(~0u, total, s);
      if (lane + s < kSizes) before += other;
    }
    if (lane < kSizes) larger[lane] = before;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    if (sizes[r] < 0) continue;
    const int at = larger[sizes[r]] + counts[r * kWarps + warp][sizes[r]] + places[r];
    shared.chunks[at] = KnownChunk{chunks[r].x, chunks[r].y, chunks[r].z};
  }
  __syncthreads();
}

template <typename S>
__device__ KnownChunk ChunkAt(int at, int num_chunks, const Arguments& arguments,
                              const SharedMemory<S>& shared) {
  if (num_chunks <= kMostKnown) return shared.chunks[at];
  const int* chunk = arguments.notes + kFirstChunkNote + 4 * (num_chunks - 1 - at);
  return {chunk[0], chunk[1], chunk[2]};
}

// The tiles of a pair: chunk by chunk, the weight rows of each in turn.
template <typename S>
class SortedTiles {
 public:
  __device__ SortedTiles(const Arguments& arguments, const SharedMemory<S>& shared)
      : arguments_(arguments), shared_(shared), num_chunks_(arguments.notes[0]) {
    rows_ = (arguments.outputs + S::kRows * S::kPair - 1) / (S::kRows * S::kPair);
    Advance(blockIdx.x / S::kPair);
  }

  __device__ bool Next(Tile& tile) {
    if (chunk_ >= num_chunks_) return false;
    const KnownChunk chunk = ChunkAt(chunk_, num_chunks_, arguments_, shared_);
    const int rank = sm90::ClusterRank();
    tile = {chunk.expert, (row_ * S::kPair + rank) * S::kRows, chunk.begin, chunk.count, false};
    Advance(gridDim.x / S::kPair);
    return true;
  }

 private:
  __device__ void Advance(int rows) {
    for (row_ += rows; row_ >= rows_; row_ -= rows_) ++chunk_;
  }

  const Arguments& arguments_;
  const SharedMemory<S>& shared_;
  const int num_chunks_;
  int rows_, row_ = 0, chunk_ = 0;
};

// Tiles that are dealt out. Large ones are bound by arithmetic and the L2, small ones by memory:
// both should be under way all the time, and no large one begun last. So two blocks of three take
// the largest that is left, the third the smallest. If the last round would leave more than half of
// the blocks idle, its tiles are set aside, and two blocks share one.
template <typename S>
class DealtTiles {
 public:
  __device__ DealtTiles(const Arguments& arguments, const SharedMemory<S>& shared)
      : arguments_(arguments), shared_(shared), num_chunks_(arguments.notes[0]) {
    static_assert(S::kPair == 1 && S::kRowBlocks == 2);
    rows_ = (arguments.outputs + S::kRows - 1) / S::kRows;
    whole_ = num_ = num_chunks_ * rows_;
    const int blocks = gridDim.x, last = num_ % blocks;
    if (last * 2 <= blocks) {
      whole_ -= last;
      num_ += last;
    }
  }

  __device__ bool Next(Tile& tile) {
    const bool from_front = blockIdx.x % 3 < 2;
    // How many tiles were taken from either end before this one.
    unsigned back = blockIdx.x / 3, front = blockIdx.x - back;
    if (!is_first_) {
      const unsigned long long taken =
          atomicAdd(&arguments_.dealt->taken, from_front ? 1ull : 1ull << 32);
      back = gridDim.x / 3 + static_cast<unsigned>(taken >> 32);
      front = gridDim.x - gridDim.x / 3 + static_cast<unsigned>(taken);
    }
    is_first_ = false;
    const int ticket = static_cast<int>(front + back);
    if (ticket >= num_) {
      if (atomicAdd(&arguments_.dealt->finished, 1) == static_cast<int>(gridDim.x) - 1) {
        *arguments_.dealt = {};  // nobody will ask any more
      }
      return false;
    }
    int item = static_cast<int>(from_front ? front : whole_ - 1 - back), half = 0;
    tile.narrow = ticket >= whole_;
    if (tile.narrow) {
      item = whole_ + (ticket - whole_) / 2;
      half = (ticket - whole_) % 2;
    }
    const KnownChunk chunk = ChunkAt(item / rows_, num_chunks_, arguments_, shared_);
    tile.expert = chunk.expert;
    tile.row = item % rows_ * S::kRows + half * (S::kRows / 2);
    tile.token = chunk.begin;
    tile.count = chunk.count;
    return true;
  }

 private:
  const Arguments& arguments_;
  const SharedMemory<S>& shared_;
  const int num_chunks_;
  int num_, whole_;  // tickets; those before `whole_` have all weight rows
  int rows_;
  bool is_first_ = true;
};

// Where the copying thread gets its tiles from, which it hands on if others do not walk themselves.
template <typename S>
class TileSource {
 public:
  __device__ TileSource(const Arguments& arguments, SharedMemory<S>& shared)
      : shared_(shared), tiles_(arguments, shared) {}

  __device__ bool Next(Tile& tile) {
    const bool exists = tiles_.Next(tile);
    if constexpr (S::kIsQueued) {
      TileQueue& queue = shared_.queue;
      BarrierWait(&queue.empty[place_.stage], place_.phase ^ 1);
      if (!exists) tile.expert = -1;
      queue.tiles[place_.stage] = tile;
      sm90::BarrierArriveIf(&queue.full[place_.stage], true);
      place_.Advance();
    }
    return exists;
  }

 private:
  using Tiles = std::conditional_t<S::kIsDealt, DealtTiles<S>,
                                   std::conditional_t<S::kIsQueued, SortedTiles<S>, DenseTiles<S>>>;

  SharedMemory<S>& shared_;
  Tiles tiles_;
  Ring<TileQueue::kTiles> place_;
};

// What it hands on, for the other warps.
template <typename S>
class QueuedTiles {
 public:
  // Warps: those that compute, that gather, and of gathered rows the one that multiplies factors.
  static constexpr int kTakers =
      kConsumers / 32 + (S::kWork == Work::kGathered ? 1 + S::kGatherThreads / 32 : 0);

  __device__ QueuedTiles(const Arguments&, SharedMemory<S>& shared) : queue_(shared.queue) {}

  // All threads of a warp.
  __device__ bool Next(Tile& tile) {
    BarrierWait(&queue_.full[place_.stage], place_.phase);
    tile = queue_.tiles[place_.stage];
    __syncwarp();
    sm90::BarrierArriveIf(&queue_.empty[place_.stage], threadIdx.x % 32 == 0);
    place_.Advance();
    return tile.expert >= 0;
  }

 private:
  TileQueue& queue_;
  Ring<TileQueue::kTiles> place_;
};
template <typename S>
using Tiles = std::conditional_t<S::kIsQueued, QueuedTiles<S>, DenseTiles<S>>;

}  // namespace fathom::fp8_tile
