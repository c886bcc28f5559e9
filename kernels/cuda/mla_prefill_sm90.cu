#include "kernels/cuda/mla_prefill_sm90.h"

#include <cuda_fp8.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "base/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/mla_prefill_plan.h"
#include "kernels/cuda/sm90_bf16.cuh"
#include "kernels/cuda/sm90_launch.h"
#include "kernels/ops.h"

namespace fathom {
namespace mla_prefill {
namespace {

using sm90::BarrierArriveIf;
using sm90::BarrierWait;
using sm90::OperandB;
using sm90::SharedAddress;
using sm90::SyncThreads;
using sm90::TileDescriptor;
using sm90::TransposedDescriptor;

constexpr int kThreads = 384;  // a warpgroup that copies, two that compute 64 queries each
constexpr int kStages = 2;
constexpr int kGroupRows = 64;
constexpr int kQueryBoxes = kQueryDim / 64;  // the last is rotated
constexpr int kValueBoxes = kHeadDim / 64;

constexpr int kTurn = 1;  // named barriers, one per warpgroup: its turn to start products

// What all of a block works on: a head of a tile of queries. Without keys: that was all.
struct Item {
  QueryTile tile;
  int head;
};

struct SharedMemory {
  unsigned char query[kQueryBoxes][kBoxBytes];
  unsigned char key[kStages][kQueryBoxes][kBoxBytes];
  unsigned char value[kStages][kValueBoxes][kBoxBytes];
  float never;  // written
  Item item;    // comes and goes with the queries
  uint64_t query_full, query_empty;
  uint64_t key_full[kStages], key_empty[kStages];
  uint64_t value_full[kStages], value_empty[kStages];
};
constexpr int kSharedBytes = sizeof(SharedMemory) + sm90::kTileAlignment;

struct Arguments {
  PieceCounts* counts;
  const QueryTile* tiles;
  float scale_log2;
  int piece_tokens;
  float* outputs;
  float2* sums;
  __nv_bfloat16* out;
  unsigned char* out_fp8;
  float* out_scales;
};

__device__ int KeyTilesOf(const QueryTile& tile) { return (tile.num_keys + kTile - 1) / kTile; }

struct Maps {
  const CUtensorMap &queries, &query_ropes, &keys, &values, &ropes;
};

// --- the thread that copies

__device__ void CopyKeys(const Maps& maps, const Arguments& arguments, const Item& item, int* step,
                         SharedMemory& shared) {
  const uint64_t keep = sm90::EvictLastPolicy();
  const int count = KeyTilesOf(item.tile);
  for (int i = 0; i < count; ++i, ++*step) {
    const int stage = *step % kStages, parity = (*step / kStages - 1) & 1;
    const int row = item.tile.key_row + i * kTile;
    const int head_row = item.head * arguments.piece_tokens + row;
    if (*step >= kStages) BarrierWait(&shared.key_empty[stage], parity);
    uint64_t* full = &shared.key_full[stage];
    sm90::BarrierExpectBytes(full, kQueryBoxes * kBoxBytes);
    sm90::CopyBox(shared.key[stage][0], &maps.keys, 0, head_row, full, keep);
    sm90::CopyBox(shared.key[stage][1], &maps.keys, 64, head_row, full, keep);
    sm90::CopyBox(shared.key[stage][2], &maps.ropes, 0, row, full, keep);
    if (*step >= kStages) BarrierWait(&shared.value_empty[stage], parity);
    full = &shared.value_full[stage];
    sm90::BarrierExpectBytes(full, kValueBoxes * kBoxBytes);
    sm90::CopyBox(shared.value[stage][0], &maps.values, 0, head_row, full, keep);
    sm90::CopyBox(shared.value[stage][1], &maps.values, 64, head_row, full, keep);
  }
}

// A block begins with the item of its own number; whoever is done takes the next of all. Which
// block computes an item changes nothing in the result.
__device__ void CopyTiles(const Maps& maps, const Arguments& arguments, SharedMemory& shared) {
  const uint64_t leave = sm90::EvictFirstPolicy();
  PieceCounts* counts = arguments.counts;
  const auto tile_of = [&](int item) { return arguments.tiles[item / kHeads]; };
  int number = blockIdx.x, step = 0;
  QueryTile tile = tile_of(number);  // perhaps nobody's: then it is not used
  const int items = counts->num_query_tiles * kHeads;
  for (int round = 0;; ++round) {
    if (round > 0) BarrierWait(&shared.query_empty, (round - 1) & 1);
    if (number >= items) break;
    const Item item = {tile, number % kHeads};
    shared.item = item;
    uint64_t* full = &shared.query_full;
    sm90::BarrierExpectBytes(full, kQueryBoxes * kBoxBytes);
    const int column = item.head * kQueryDim, token = tile.first_token;
    sm90::CopyBox(shared.query[0], &maps.queries, column, token, full, leave);
    sm90::CopyBox(shared.query[1], &maps.queries, column + 64, token, full, leave);
    sm90::CopyBox(shared.query[2], &maps.query_ropes, item.head * kRope, token, full, leave);
    CopyKeys(maps, arguments, item, &step, shared);
    number = gridDim.x + atomicAdd(&counts->taken, 1);
    if (number < items) tile = tile_of(number);
  }
  shared.item.tile.num_keys = 0;
  BarrierArriveIf(&shared.query_full, true);
  __threadfence();
  if (atomicAdd(&counts->ended, 1) == static_cast<int>(gridDim.x) - 1) {  // all have taken theirs
    counts->taken = 0;
    counts->ended = 0;
  }
}

// --- the warpgroups that compute

// Where this thread's accumulators stand: rows row and row + 8 of the tile.
struct Place {
  int group, lane, row;
};

struct State {
  float output[64];
  float largest[2];  // of this row's scores, and of row + 8's
  float sum[2];      // of exponentials, of this thread's columns only
};

__device__ float Exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// Keeps the assembler from waiting for products before `value` has been computed beside them: it
// moves a wait, which depends on nothing, as far up as it can. `value` is not negative.
__device__ void StayBefore(float value, float* never) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p st.volatile.shared.f32 [%1], %0;\n}" ::
          "f"(value),
      "r"(SharedAddress(never))
      : "memory");
}
template <typename Fn>
__device__ float ReduceQuad(float value, Fn fn) {
  value = fn(value, __shfl_xor_sync(~0u, value, 1));
  return fn(value, __shfl_xor_sync(~0u, value, 2));
}
__device__ float QuadMax(float value) {
  return ReduceQuad(value, [](float a, float b) { return fmaxf(a, b); });
}
__device__ float QuadSum(float value) {
  return ReduceQuad(value, [](float a, float b) { return a + b; });
}

// Starts scores = queries · keysᵀ.
__device__ void StartScores(const SharedMemory& shared, int stage, int group, float (&scores)[64]) {
  const uint32_t query = SharedAddress(shared.query) + group * kGroupRows * 128;
  const uint32_t key = SharedAddress(shared.key[stage]);
  sm90::ProductsBegin();
#pragma unroll
  for (int k = 0; k < kQueryDim / 16; ++k) {
    const int offset = k / 4 * kBoxBytes + k % 4 * 32;
    sm90::ProductBf16N128<OperandB::kAsStored>(scores, TileDescriptor(query + offset),
                                               TileDescriptor(key + offset), k > 0);
  }
  sm90::ProductsCommit();
}

// Starts output += probabilities · values.
__device__ void StartOutput(const SharedMemory& shared, int stage,
                            const uint32_t (&probabilities)[kTile / 16][4], float (&output)[64]) {
  const uint32_t value = SharedAddress(shared.value[stage]);
  sm90::ProductsBegin();
#pragma unroll
  for (int k = 0; k < kTile / 16; ++k) {
    sm90::ProductBf16N128<OperandB::kTransposed>(
        output, probabilities[k], TransposedDescriptor(value + k * 16 * 128, kBoxBytes), true);
  }
  sm90::ProductsCommit();
}

// Row `row` sees the columns up to `last` of the tile, row + 8 up to last + 8.
__device__ void Mask(int last, int lane, float (&scores)[64]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (column > last + (i & 2) * 4) scores[i] = -INFINITY;
  }
}

// Scores to probabilities under the running maximum; `shrink` is what the output has to be
// multiplied by.
__device__ void Softmax(float scale_log2, float (&scores)[64], State& state, float (&shrink)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = state.largest[half];
#pragma unroll
    for (int i = half * 2; i < 64; i += 4) {
      largest = fmaxf(largest, fmaxf(scores[i], scores[i + 1]));
    }
    largest = QuadMax(largest);
    shrink[half] = Exp2((state.largest[half] - largest) * scale_log2);
    state.largest[half] = largest;
    const float shift = -largest * scale_log2;
    float sum = state.sum[half] * shrink[half];
#pragma unroll
    for (int i = half * 2; i < 64; i += 4) {
      scores[i] = Exp2(fmaf(scores[i], scale_log2, shift));
      scores[i + 1] = Exp2(fmaf(scores[i + 1], scale_log2, shift));
      sum += scores[i] + scores[i + 1];
    }
    state.sum[half] = sum;
  }
}

__device__ void Shrink(const float (&shrink)[2], State& state) {
#pragma unroll
  for (int i = 0; i < 64; ++i) state.output[i] *= shrink[i / 2 % 2];
}
__device__ void Pack(const float (&scores)[64], uint32_t (&probabilities)[kTile / 16][4]) {
#pragma unroll
  for (int k = 0; k < kTile / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      probabilities[k][i] = sm90::PackBf16(scores[k * 8 + i * 2], scores[k * 8 + i * 2 + 1]);
    }
  }
}

// --- where results go

// Calls fn(half, token) for the rows of this thread that exist.
template <typename Fn>
__device__ void ForRows(const QueryTile& tile, const Place& place, Fn fn) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = place.row + half * 8;
    fn(half, tile.first_token + row, row < tile.num_tokens);
  }
}

__device__ void LoadState(const Arguments& arguments, const QueryTile& tile, int head,
                          const Place& place, State& state) {
  ForRows(tile, place, [&](int half, int token, bool exists) {
    if (!exists) return;
    const int64_t row = int64_t{token} * kHeads + head;
    const float2 sums = arguments.sums[row];
    state.largest[half] = sums.x;
    state.sum[half] = place.lane % 4 == 0 ? sums.y : 0.0f;
    const float2* outputs =
        reinterpret_cast<const float2*>(arguments.outputs + row * kHeadDim) + place.lane % 4;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 pair = outputs[j * 4];
      state.output[j * 4 + half * 2] = pair.x;
      state.output[j * 4 + half * 2 + 1] = pair.y;
    }
  });
}

// state.sum is the whole row's.
__device__ void StoreState(const Arguments& arguments, const QueryTile& tile, int head,
                           const Place& place, const State& state) {
  ForRows(tile, place, [&](int half, int token, bool exists) {
    if (!exists) return;
    const int64_t row = int64_t{token} * kHeads + head;
    if (place.lane % 4 == 0) {
      arguments.sums[row] = make_float2(state.largest[half], state.sum[half]);
    }
    float2* outputs =
        reinterpret_cast<float2*>(arguments.outputs + row * kHeadDim) + place.lane % 4;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      outputs[j * 4] =
          make_float2(state.output[j * 4 + half * 2], state.output[j * 4 + half * 2 + 1]);
    }
  });
}

__device__ void StoreBf16(const Arguments& arguments, const QueryTile& tile, int head,
                          const Place& place, const State& state) {
  ForRows(tile, place, [&](int half, int token, bool exists) {
    const float factor = 1.0f / state.sum[half];
    __nv_bfloat16* out =
        arguments.out + (int64_t{token} * kHeads + head) * kHeadDim + place.lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* pair = &state.output[(i * 4 + j) * 4 + half * 2];
        words[j] = sm90::PackBf16(pair[0] * factor, pair[1] * factor);
      }
      sm90::TransposeQuad(words, place.lane);
      if (exists) {
        *reinterpret_cast<uint4*>(out + i * 32) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  });
}

// A head's 128 values are one group of 1×128.
__device__ void StoreFp8(const Arguments& arguments, const QueryTile& tile, int head,
                         const Place& place, const State& state) {
  ForRows(tile, place, [&](int half, int token, bool exists) {
    const float factor = 1.0f / state.sum[half];
    float values[32], largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const float value = state.output[i / 2 * 4 + half * 2 + i % 2] * factor;
      values[i] = __bfloat162float(__float2bfloat16(value));
      largest = fmaxf(largest, fabsf(values[i]));
    }
    largest = QuadMax(largest);
    const float scale = fmaxf(largest, kSmallestQuantizedMagnitude) / 448.0f;
    // Division as by the hardware's own, but for its branches.
    const float inverse = fminf(1.0f / scale, 3e38f);
    const auto divide = [&](float value) {
      const float quotient = value * inverse;
      return fmaf(fmaf(-quotient, scale, value), inverse, quotient);
    };
    const int64_t row = int64_t{token} * kHeads + head;
    if (exists && place.lane % 4 == 0) arguments.out_scales[row] = scale;
    // Columns 2(l % 4) + {0, 1} of 16 groups of eight columns, two groups to a word.
    const auto pair = [&](int j) {
      return uint32_t{
          __nv_cvt_float2_to_fp8x2(make_float2(divide(values[j * 2]), divide(values[j * 2 + 1])),
                                   __NV_SATFINITE, __NV_E4M3)};
    };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        words[j] = pair(i * 8 + j * 2) | pair(i * 8 + j * 2 + 1) << 16;
      }
      sm90::TransposeQuad(words, place.lane);
      if (exists) {
        *reinterpret_cast<uint4*>(arguments.out_fp8 + row * kHeadDim + i * 64 +
                                  place.lane % 4 * 16) =
            make_uint4(
                __byte_perm(words[0], words[1], 0x5410), __byte_perm(words[2], words[3], 0x5410),
                __byte_perm(words[0], words[1], 0x7632), __byte_perm(words[2], words[3], 0x7632));
      }
    }
  });
}

__device__ void ComputeTiles(const Arguments& arguments, const Place& place, SharedMemory& shared) {
  const bool speaks = place.lane == 0;
  const int turn = kTurn + place.group, next_turn = kTurn + 1 - place.group;
  if (place.group == 1) sm90::ArriveThreads(next_turn, 256);
  int step = 0;
  for (int round = 0;; ++round) {
    BarrierWait(&shared.query_full, round & 1);
    const QueryTile tile = shared.item.tile;
    const int head = shared.item.head;
    if (tile.num_keys == 0) break;
    State state = {};
    state.largest[0] = state.largest[1] = -INFINITY;
    if (tile.continues) LoadState(arguments, tile, head, place, state);

    // The first tile's scores; then, while they become probabilities, nothing.
    const int count = KeyTilesOf(tile);
    const int unmasked = max(tile.diagonal + place.group * kGroupRows + 1, 0) / kTile;
    const int last = tile.diagonal + place.row;
    float scores[64], shrink[2];
    uint32_t probabilities[kTile / 16][4];
    BarrierWait(&shared.key_full[step % kStages], step / kStages & 1);
    SyncThreads(turn, 256);
    StartScores(shared, step % kStages, place.group, scores);
    sm90::ArriveThreads(next_turn, 256);
    sm90::ProductsWait<0>();
    BarrierArriveIf(&shared.key_empty[step % kStages], speaks);
    if (unmasked < 1) Mask(last, place.lane, scores);
    Softmax(arguments.scale_log2, scores, state, shrink);
    Shrink(shrink, state);
    Pack(scores, probabilities);

    // From here on the next tile's scores become probabilities while this one's values are summed.
    const auto overlap = [&](int i, auto masked) {
      const int stage = step % kStages, parity = step / kStages & 1;
      const int next = (step + 1) % kStages, next_parity = (step + 1) / kStages & 1;
      BarrierWait(&shared.key_full[next], next_parity);
      SyncThreads(turn, 256);
      StartScores(shared, next, place.group, scores);
      BarrierWait(&shared.value_full[stage], parity);
      StartOutput(shared, stage, probabilities, state.output);
      sm90::ArriveThreads(next_turn, 256);
      sm90::ProductsWait<1>();
      BarrierArriveIf(&shared.key_empty[next], speaks);
      if constexpr (masked.value) Mask(last - i * kTile, place.lane, scores);
      Softmax(arguments.scale_log2, scores, state, shrink);
      StayBefore(state.sum[0] + state.sum[1], &shared.never);
      sm90::ProductsWait<0>();
      BarrierArriveIf(&shared.value_empty[stage], speaks);
      Shrink(shrink, state);
      Pack(scores, probabilities);
      ++step;
    };
    int i = 1;
    for (; i < min(unmasked, count); ++i) overlap(i, std::false_type());
    for (; i < count; ++i) overlap(i, std::true_type());
    BarrierArriveIf(&shared.query_empty, true);
    BarrierWait(&shared.value_full[step % kStages], step / kStages & 1);
    StartOutput(shared, step % kStages, probabilities, state.output);
    sm90::ProductsWait<0>();
    BarrierArriveIf(&shared.value_empty[step % kStages], speaks);
    ++step;

    state.sum[0] = QuadSum(state.sum[0]);
    state.sum[1] = QuadSum(state.sum[1]);
    if (tile.unfinished) {
      StoreState(arguments, tile, head, place, state);
    } else if (arguments.out_scales == nullptr) {
      StoreBf16(arguments, tile, head, place, state);
    } else {
      StoreFp8(arguments, tile, head, place, state);
    }
  }
}

__global__ __launch_bounds__(kThreads, 1) void AttentionKernel(
    const __grid_constant__ CUtensorMap queries, const __grid_constant__ CUtensorMap query_ropes,
    const __grid_constant__ CUtensorMap keys, const __grid_constant__ CUtensorMap values,
    const __grid_constant__ CUtensorMap ropes, const Arguments arguments) {
  extern __shared__ unsigned char dynamic_shared[];
  SharedMemory& shared = *reinterpret_cast<SharedMemory*>(
      (reinterpret_cast<uintptr_t>(dynamic_shared) + 1023) & ~uintptr_t{1023});
  const int thread = threadIdx.x;
  if (thread == 0) {
    sm90::PrefetchMap(&queries);
    sm90::PrefetchMap(&query_ropes);
    sm90::PrefetchMap(&keys);
    sm90::PrefetchMap(&values);
    sm90::PrefetchMap(&ropes);
    sm90::BarrierInit(&shared.query_full, 1);
    sm90::BarrierInit(&shared.query_empty, 256);
    for (int i = 0; i < kStages; ++i) {
      sm90::BarrierInit(&shared.key_full[i], 1);
      sm90::BarrierInit(&shared.key_empty[i], 8);
      sm90::BarrierInit(&shared.value_full[i], 1);
      sm90::BarrierInit(&shared.value_empty[i], 8);
    }
    sm90::BarrierInitFence();
  }
  sm90::LetDependentsLaunch();
  __syncthreads();
  sm90::WaitForPredecessors();
  if (thread < 128) {
    sm90::GiveRegisters<40>();
    if (thread == 0) CopyTiles({queries, query_ropes, keys, values, ropes}, arguments, shared);
  } else {
    sm90::TakeRegisters<232>();
    ComputeTiles(arguments,
                 {.group = thread / 128 - 1,
                  .lane = thread % 32,
                  .row = (thread - 128) / 32 * 16 + thread % 32 / 4},
                 shared);
  }
}

// --- dividing the work

// A block per piece. Sequences stand one after another, each rounded up to whole tiles, and the
// pieces cut that row of tiles.
__global__ __launch_bounds__(MlaPrefillSm90::kMaxSequences) void ScheduleKernel(
    const int* query_start, const int* context_lens, int num_sequences, int min_chunk,
    const Workspace workspace) {
  __shared__ int warp_sums[32];
  __shared__ int num_key_tiles;
  __shared__ int costs[MlaPrefillSm90::kMaxSequences];   // of each sequence's costliest tile
  __shared__ int counts[MlaPrefillSm90::kMaxSequences];  // tiles of queries
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int piece = blockIdx.x;
  sm90::LetDependentsLaunch();
  sm90::WaitForPredecessors();
  if (thread == 0) num_key_tiles = 0;

  // In whole tiles: where this thread's sequence begins.
  int first_token = 0, chunk = 0, context = 0;
  if (thread < num_sequences) {
    first_token = query_start[thread];
    chunk = query_start[thread + 1] - first_token;
    context = context_lens[thread];
    if (chunk < min_chunk) chunk = context = 0;
  }
  const int key_tiles = (context + kTile - 1) / kTile;
  const int piece_tiles = workspace.piece_tokens / kTile;
  const int query_tiles = (chunk + kTile - 1) / kTile;
  int sum = key_tiles;
  for (int d = 1; d < 32; d *= 2) {
    const int below = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += below;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += warp_sums[w];
  const int key_begin = sum - key_tiles - piece * piece_tiles;  // seen from this piece

  KeyTile* key_list = workspace.key_tiles + int64_t{piece} * piece_tiles;
  const int key_end = min(key_begin + key_tiles, piece_tiles);
  for (int i = max(key_begin, 0); i < key_end; ++i) {
    const int first = (i - key_begin) * kTile;
    key_list[i] = {thread, first, min(kTile, context - first), 0};
  }
  if (key_tiles > 0) atomicMax(&num_key_tiles, key_end);

  // The queries' tiles that see keys of this piece.
  const int earlier = max(-key_begin, 0) * kTile;                     // keys before this piece
  const int until = min((piece_tiles - key_begin) * kTile, context);  // keys up to its end
  const auto keys_of = [&](int i) {                                   // that the tile sees at all
    return context - chunk + min((i + 1) * kTile, chunk);
  };
  int mine = 0;
  if (until > earlier) {
    for (int i = 0; i < query_tiles; ++i) mine += keys_of(i) > earlier;
  }
  // A sequence at a time, the costliest first, and its last tiles first: what is read together
  // fits the L2, and small work is left for the end.
  const int cost = mine > 0 ? min(keys_of(query_tiles - 1), until) - earlier : 0;
  costs[thread] = cost;
  counts[thread] = mine;
  __syncthreads();
  int begin = 0, total = 0;
  for (int s = 0; s < num_sequences; ++s) {
    if (costs[s] > cost || (costs[s] == cost && s < thread)) begin += counts[s];
    total += counts[s];
  }
  QueryTile* list = workspace.query_tiles + int64_t{piece} * workspace.max_query_tiles + begin;
  for (int j = 0; j < mine; ++j) {
    const int i = query_tiles - 1 - j;
    list[j] = {.first_token = first_token + i * kTile,
               .num_tokens = min(kTile, chunk - i * kTile),
               .key_row = max(key_begin, 0) * kTile,
               .num_keys = min(keys_of(i), until) - earlier,
               .diagonal = context - chunk + i * kTile - earlier,
               .continues = earlier > 0,
               .unfinished = until < keys_of(i),
               .unused = 0};
  }
  if (thread == 0) {
    workspace.counts[piece] = {
        .num_key_tiles = num_key_tiles, .num_query_tiles = total, .taken = 0, .ended = 0};
  }
}

Workspace Divide(void* base, const MlaPrefillSm90::Limits& limits) {
  constexpr int64_t kAlignment = 1024;
  constexpr int kMaxSequences = MlaPrefillSm90::kMaxSequences;
  Workspace result = {};
  const auto take = [&]<typename T>(T*& part, int64_t count) {
    part = reinterpret_cast<T*>(static_cast<char*>(base) + result.num_bytes);
    result.num_bytes += (count * int64_t{sizeof(T)} + kAlignment - 1) / kAlignment * kAlignment;
  };
  const int64_t piece = limits.piece_tokens, tokens = limits.max_tokens;
  const int sequences = std::min(limits.max_tokens, kMaxSequences);
  result.piece_tokens = limits.piece_tokens;
  result.max_query_tiles = limits.max_tokens / kTile + sequences;
  result.max_pieces = static_cast<int>(
      (limits.max_context_tokens + int64_t{kTile} * sequences + piece - 1) / piece);
  take(result.keys, kHeads * piece * kHeadDim);
  take(result.values, kHeads * piece * kHeadDim);
  take(result.ropes, piece * kRope);
  take(result.query_ropes, tokens * kHeads * kRope);
  take(result.latents, piece * kRank);
  take(result.outputs, tokens * kHeads * kHeadDim);
  take(result.sums, tokens * kHeads);
  take(result.counts, result.max_pieces);
  take(result.key_tiles, result.max_pieces * (piece / kTile));
  take(result.query_tiles, int64_t{result.max_pieces} * result.max_query_tiles);
  return result;
}

CUtensorMap MapTiles(const void* data, int64_t rows, int64_t columns) {
  return sm90::MapMatrix({.data = const_cast<void*>(data),
                          .type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                          .element_bytes = 2,
                          .rows = rows,
                          .columns = columns,
                          .box_rows = kTile,
                          .box_columns = 64});
}

}  // namespace
}  // namespace mla_prefill

using mla_prefill::kTile;

int64_t MlaPrefillSm90::WorkspaceBytes(const Limits& limits) {
  // Addresses do not matter for the size.
  return mla_prefill::Divide(nullptr, limits).num_bytes;
}

bool MlaPrefillSm90::Supports(const cudaDeviceProp& device) {
  return device.major == 9 && device.minor == 0;
}

MlaPrefillSm90::MlaPrefillSm90(void* workspace, const Limits& limits, int num_multiprocessors)
    : workspace_(workspace), limits_(limits), num_multiprocessors_(num_multiprocessors) {
  CHECK(limits.max_tokens > 0 && limits.max_context_tokens > 0);
  CHECK(limits.piece_tokens > 0 && limits.piece_tokens % kTile == 0);
  CUDA_CHECK(cudaFuncSetAttribute(mla_prefill::AttentionKernel,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  mla_prefill::kSharedBytes));
  mla_prefill::PrepareExpand();
}

MlaPrefillSm90::Step MlaPrefillSm90::Schedule(const Batch& batch, cudaStream_t stream) const {
  const int sequences = batch.num_sequences;
  CHECK(sequences >= 1 && sequences <= kMaxSequences);
  const mla_prefill::Workspace workspace = mla_prefill::Divide(workspace_, limits_);
  int64_t tiles = 0;
  for (int s = 0; s < sequences; ++s) {
    const int chunk = batch.host_query_start[s + 1] - batch.host_query_start[s];
    CHECK(chunk <= batch.host_context_lens[s]);
    if (chunk >= batch.min_chunk) tiles += (batch.host_context_lens[s] + kTile - 1) / kTile;
  }
  const int piece_tiles = limits_.piece_tokens / kTile;
  const Step step = {.num_tokens = batch.host_query_start[sequences],
                     .num_pieces = static_cast<int>((tiles + piece_tiles - 1) / piece_tiles)};
  CHECK_LE(step.num_tokens, limits_.max_tokens);
  CHECK_LE(step.num_pieces, workspace.max_pieces);
  if (step.num_pieces == 0) return step;
  sm90::LaunchDependent(mla_prefill::ScheduleKernel, step.num_pieces, kMaxSequences, 0, stream,
                        batch.query_start, batch.context_lens, sequences, batch.min_chunk,
                        workspace);
  return step;
}

void MlaPrefillSm90::Run(const Step& step, const MlaCache& cache, const Layer& layer,
                         cudaStream_t stream) const {
  CHECK(cache.block_size > 0 && cache.block_size % 16 == 0);
  CHECK((layer.out_fp8 == nullptr) == (layer.out_scales == nullptr));
  CHECK((layer.out == nullptr) != (layer.out_fp8 == nullptr));
  const mla_prefill::Workspace workspace = mla_prefill::Divide(workspace_, limits_);
  const int64_t rows = int64_t{kHeads} * limits_.piece_tokens;
  const CUtensorMap queries =
      mla_prefill::MapTiles(layer.q, step.num_tokens, kHeads * mla_prefill::kQueryDim);
  const CUtensorMap query_ropes =
      mla_prefill::MapTiles(workspace.query_ropes, step.num_tokens, kHeads * kRopeHeadDim);
  const CUtensorMap keys = mla_prefill::MapTiles(workspace.keys, rows, kHeadDim);
  const CUtensorMap values = mla_prefill::MapTiles(workspace.values, rows, kHeadDim);
  const CUtensorMap ropes =
      mla_prefill::MapTiles(workspace.ropes, limits_.piece_tokens, kRopeHeadDim);
  for (int piece = 0; piece < step.num_pieces; ++piece) {
    if (layer.parts != Parts::kAttention) {
      mla_prefill::Expand(workspace, piece,
                          {.cache = cache,
                           .w_uk = layer.w_uk,
                           .w_uv = layer.w_uv,
                           .block_tables = layer.block_tables,
                           .max_blocks = layer.max_blocks,
                           .q = layer.q,
                           .positions = layer.positions,
                           .cos_sin = layer.cos_sin,
                           .num_tokens = step.num_tokens},
                          num_multiprocessors_, stream);
    }
    if (layer.parts == Parts::kExpansion) continue;
    const mla_prefill::Arguments arguments = {
        .counts = workspace.counts + piece,
        .tiles = workspace.query_tiles + int64_t{piece} * workspace.max_query_tiles,
        .scale_log2 = layer.scale * static_cast<float>(M_LOG2E),
        .piece_tokens = limits_.piece_tokens,
        .outputs = workspace.outputs,
        .sums = workspace.sums,
        .out = layer.out,
        .out_fp8 = static_cast<unsigned char*>(layer.out_fp8),
        .out_scales = layer.out_scales};
    sm90::LaunchDependent(mla_prefill::AttentionKernel, num_multiprocessors_, mla_prefill::kThreads,
                          mla_prefill::kSharedBytes, stream, queries, query_ropes, keys, values,
                          ropes, arguments);
  }
}

}  // namespace fathom
