#include "kernels/cuda/mla_decode_sm90.h"

#include <cmath>

#include "base/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/sm90.cuh"
#include "kernels/cuda/sm90_launch.h"

namespace fathom {
namespace {

using sm90::BarrierArriveIf;
using sm90::BarrierWait;
using sm90::OperandA;
using sm90::SharedAddress;
using sm90::SyncThreads;
using sm90::TileDescriptor;

constexpr int kHeads = MlaDecodeSm90::kHeads;
constexpr int kRank = MlaDecodeSm90::kKvLoraRank;
constexpr int kBlockSize = MlaDecodeSm90::kBlockSize;
constexpr int kWidth = kRank + MlaDecodeSm90::kRopeHeadDim;  // 576
constexpr int kPieceTokens = 16;
constexpr int kOutputs = kHeads * kRank;

// A tile of up to 64 tokens is nine boxes of 64 columns; the last holds the rotated key. Boxes are
// loaded and freed in three groups, the rotated key in the first, so that the products begin before
// the tile is complete and the next one starts to come in before they end.
constexpr int kBoxes = kWidth / 64;
constexpr int kGroups = 3;
constexpr int kBoxBytes = kBlockSize * sm90::kSwizzledRowBytes;
constexpr int kQueryBoxBytes = kHeads * sm90::kSwizzledRowBytes;
constexpr int kStages = 2;
constexpr int kConsumers = 128;            // one warpgroup
constexpr int kThreads = kConsumers + 32;  // and a warp that copies
constexpr int kMaxShares = 256;            // SMs
constexpr int kAllConsumers = 1;           // named barrier; 2 and 3: halves while combining

// Which box is the j-th of group g.
__device__ constexpr int BoxOf(int group, int j) { return (group * 3 + j + kBoxes - 1) % kBoxes; }

// Where a share of the work begins.
struct Share {
  int sequence;        // that the first unit belongs to
  int sequence_start;  // number of that sequence's first unit
  int total_units;     // of all sequences
  int unit_tokens;     // 64, or 16 when there is enough work to be worth the finer division
};

// Partial results: a share can begin and end in the middle of a sequence, so it has two slots.
struct Partials {
  float* sums;    // [2 * shares][512][16]: unnormalised output
  float* maxima;  // [2 * shares][2][16]: largest score, then sum of exponentials
  int* arrivals;  // [kMaxSequences]: shares of the sequence that have been written
};

struct Arguments {
  MlaDecodeSm90::Layer layer;
  float scale_log2;
  const Share* shares;
  Partials partials;
};

struct alignas(1024) SharedMemory {
  unsigned char kv[kStages][kBoxes * kBoxBytes];
  unsigned char query[kBoxes * kQueryBoxBytes];
  alignas(1024) unsigned char probabilities[kHeads * sm90::kSwizzledRowBytes];  // P', bf16
  float warp_values[4][kHeads];
  float combine[kConsumers][4];
  uint64_t full[kStages][kGroups];
  uint64_t empty[kStages][kGroups];
};

__host__ __device__ int UnitsOf(int context_len, int unit_tokens) {
  return (context_len + unit_tokens - 1) / unit_tokens;
}

// Share `index` of `count` owns units [Begin(index), Begin(index + 1)).
__device__ int BeginOfShare(int total_units, int index, int count) {
  return static_cast<int>(static_cast<long long>(total_units) * index / count);
}
// The share that owns a unit.
__device__ int ShareOfUnit(int total_units, int unit, int count) {
  return static_cast<int>(((unit + 1LL) * count - 1) / total_units);
}

// --- once per step

__global__ void ScheduleKernel(const int* context_lens, int num_sequences, int num_shares,
                               Share* shares, int* arrivals, int num_arrivals) {
  __shared__ int starts[MlaDecodeSm90::kMaxSequences + 1];
  __shared__ int unit_tokens;
  for (int i = threadIdx.x; i < num_arrivals; i += blockDim.x) arrivals[i] = 0;
  if (threadIdx.x == 0) {
    int blocks = 0;
    for (int s = 0; s < num_sequences; ++s) blocks += UnitsOf(context_lens[s], kBlockSize);
    // With few blocks per SM a whole block more or less is a large part of an SM's work; with less
    // than one and a half each, finer shares would only mean more partial results.
    unit_tokens = blocks > num_shares + num_shares / 2 ? kPieceTokens : kBlockSize;
    int total = 0;
    for (int s = 0; s < num_sequences; ++s) {
      starts[s] = total;
      total += UnitsOf(context_lens[s], unit_tokens);
    }
    starts[num_sequences] = total;
  }
  __syncthreads();
  const int total = starts[num_sequences];
  const int used = min(num_shares, total);
  for (int i = threadIdx.x; i < num_shares; i += blockDim.x) {
    Share share = {0, 0, total, unit_tokens};
    if (i < used) {
      const int begin = BeginOfShare(total, i, used);
      while (starts[share.sequence + 1] <= begin) ++share.sequence;
      share.sequence_start = starts[share.sequence];
    }
    shares[i] = share;
  }
}

// --- the warp that copies

__device__ void CopyShare(const CUtensorMap& blocks, const CUtensorMap& pieces,
                          const MlaDecodeSm90::Layer& layer, const Share& share, int begin, int end,
                          SharedMemory& shared) {
  const uint64_t policy = sm90::EvictFirstPolicy();
  const int units_per_block = kBlockSize / share.unit_tokens;
  int sequence = share.sequence;
  int start = share.sequence_start;
  int units = UnitsOf(layer.context_lens[sequence], share.unit_tokens);
  for (int unit = begin, tile = 0; unit < end; ++tile) {
    while (unit >= start + units) {
      start += units;
      ++sequence;
      units = UnitsOf(layer.context_lens[sequence], share.unit_tokens);
    }
    const int first = unit - start;
    const int in_block = first % units_per_block;
    const int count = min(min(units_per_block - in_block, end - unit), start + units - unit);
    const int tokens = count * share.unit_tokens;
    const int table_entry = sequence * layer.max_blocks + first / units_per_block;
    const int row = layer.block_tables[table_entry] * kBlockSize + in_block * share.unit_tokens;
    const int stage = tile % kStages;
    unsigned char* kv = shared.kv[stage];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      uint64_t* full = &shared.full[stage][g];
      if (tile >= kStages) BarrierWait(&shared.empty[stage][g], (tile / kStages - 1) & 1);
      sm90::BarrierExpectBytes(full, tokens * sm90::kSwizzledRowBytes * kBoxes / kGroups);
#pragma unroll
      for (int j = 0; j < kBoxes / kGroups; ++j) {
        const int box = BoxOf(g, j);
        unsigned char* target = kv + box * kBoxBytes;
        if (tokens == kBlockSize) {
          sm90::CopyBox(target, &blocks, box * 64, row, full, policy);
        } else {
          for (int t = 0; t < tokens; t += kPieceTokens) {
            sm90::CopyBox(target + t * sm90::kSwizzledRowBytes, &pieces, box * 64, row + t, full,
                          policy);
          }
        }
      }
    }
    unit += count;
  }
}

// --- the warpgroup that computes

// Where this thread's accumulators stand (sm90.cuh): heads head_of(i), rows (tokens or outputs)
// row() and row() + 8 of 64.
struct Place {
  int thread, warp, lane;
  __device__ int row() const { return warp * 16 + lane / 4; }
  __device__ int row(int i) const { return row() + ((i >> 1) & 1) * 8; }
  __device__ int head(int i) const { return 2 * (lane % 4) + (i & 1) + (i >> 2) * 8; }
};
// A thread sees four heads; accumulator i belongs to the slot-th of them.
__device__ constexpr int HeadSlot(int i) { return (i & 1) + (i >> 2) * 2; }
__device__ int HeadOfSlot(const Place& place, int slot) {
  return 2 * (place.lane % 4) + (slot & 1) + (slot >> 1) * 8;
}

__device__ void LoadQuery(const MlaDecodeSm90::Layer& layer, int sequence, const Place& place,
                          SharedMemory& shared) {
  const __nv_bfloat16* latent = layer.q_latent + int64_t{sequence} * kOutputs;
  const __nv_bfloat16* rope = layer.q_rope + sequence * layer.q_rope_token_stride;
  for (int i = place.thread; i < kBoxes * kHeads * 8; i += kConsumers) {
    const int box = i / (kHeads * 8), head = i / 8 % kHeads, piece = i % 8;
    const __nv_bfloat16* source = box < kBoxes - 1 ? latent + head * kRank + box * 64
                                                   : rope + head * layer.q_rope_head_stride;
    *reinterpret_cast<uint4*>(shared.query + box * kQueryBoxBytes + head * 128 +
                              ((piece ^ (head & 7)) * 16)) =
        *reinterpret_cast<const uint4*>(source + piece * 8);
  }
  sm90::FenceForAsyncProxy();
  SyncThreads(kAllConsumers, kConsumers);
}

template <typename Fn>
__device__ void ReduceOverRows(float (&values)[4], Fn fn) {
#pragma unroll
  for (int slot = 0; slot < 4; ++slot) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      values[slot] = fn(values[slot], __shfl_xor_sync(~0u, values[slot], lanes));
    }
  }
}

// Leaves each warp's values of the 16 heads where all warps see them.
__device__ void ShareWarpValues(const float (&values)[4], const Place& place,
                                SharedMemory& shared) {
  if (place.lane < 4) {
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
      shared.warp_values[place.warp][HeadOfSlot(place, slot)] = values[slot];
    }
  }
  SyncThreads(kAllConsumers, kConsumers);
}

// The running state of one sequence's part: softmax with a running maximum.
struct State {
  float output[8][8];  // O' in eight pieces of 64 rows
  float largest[4];    // score · log2(e), per head slot
  float sum[4];        // of exponentials, of this thread's rows only
};

__device__ void Scores(const SharedMemory& shared, int stage, int parity, float (&scores)[8]) {
  const uint32_t kv = SharedAddress(shared.kv[stage]);
  const uint32_t query = SharedAddress(shared.query);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    BarrierWait(const_cast<uint64_t*>(&shared.full[stage][g]), parity);
    sm90::ProductsBegin();
#pragma unroll
    for (int j = 0; j < kBoxes / kGroups; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int box = BoxOf(g, j);
        sm90::ProductBf16N16<OperandA::kAsStored>(
            scores, TileDescriptor(kv + box * kBoxBytes + k * 32),
            TileDescriptor(query + box * kQueryBoxBytes + k * 32), (g | j | k) != 0);
      }
    }
  }
  sm90::ProductsCommit();
  sm90::ProductsWait<0>();
}

// Tokens of the tile from `valid` on do not exist: their scores count nothing, and what stands
// there, which may be anything, becomes zero (zero times NaN would be NaN).
__device__ void CutTail(SharedMemory& shared, int stage, int valid, const Place& place,
                        float (&scores)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (place.row(i) >= valid) scores[i] = -INFINITY;
  }
  for (int i = place.thread; i < (kBlockSize - valid) * 64; i += kConsumers) {
    const int token = valid + i / 64, box = i / 8 % 8, piece = i % 8;
    *reinterpret_cast<uint4*>(shared.kv[stage] + box * kBoxBytes + token * 128 + piece * 16) =
        make_uint4(0, 0, 0, 0);
  }
}

// Scores to probabilities P' in shared memory, with the running maximum; what is older shrinks.
__device__ void Softmax(const float (&scores)[8], float scale_log2, const Place& place,
                        SharedMemory& shared, State& state) {
  float tile_largest[4] = {fmaxf(scores[0], scores[2]), fmaxf(scores[1], scores[3]),
                           fmaxf(scores[4], scores[6]), fmaxf(scores[5], scores[7])};
  ReduceOverRows(tile_largest, [](float a, float b) { return fmaxf(a, b); });
  ShareWarpValues(tile_largest, place, shared);
  float shrink[4];
#pragma unroll
  for (int slot = 0; slot < 4; ++slot) {
    const int head = HeadOfSlot(place, slot);
    const float largest = fmaxf(fmaxf(shared.warp_values[0][head], shared.warp_values[1][head]),
                                fmaxf(shared.warp_values[2][head], shared.warp_values[3][head]));
    const float now = fmaxf(state.largest[slot], largest * scale_log2);
    shrink[slot] = exp2f(state.largest[slot] - now);
    state.largest[slot] = now;
    state.sum[slot] *= shrink[slot];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int slot = HeadSlot(i), head = place.head(i), token = place.row(i);
    const float probability = exp2f(scores[i] * scale_log2 - state.largest[slot]);
    state.sum[slot] += probability;
    *reinterpret_cast<__nv_bfloat16*>(shared.probabilities + head * 128 +
                                      (((token >> 3) ^ (head & 7)) * 16) + (token & 7) * 2) =
        __float2bfloat16(probability);
  }
#pragma unroll
  for (int piece = 0; piece < 8; ++piece) {
#pragma unroll
    for (int i = 0; i < 8; ++i) state.output[piece][i] *= shrink[HeadSlot(i)];
  }
  sm90::FenceForAsyncProxy();
  SyncThreads(kAllConsumers, kConsumers);
}

// O' += KV' · P', freeing the tile group by group.
__device__ void Accumulate(SharedMemory& shared, int stage, const Place& place, State& state) {
  const uint32_t kv = SharedAddress(shared.kv[stage]);
  const uint32_t probabilities = SharedAddress(shared.probabilities);
  sm90::ProductsBegin();
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int box = (g == 0 ? 0 : 3 * g - 1); box < 3 * g + 2; ++box) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sm90::ProductBf16N16<OperandA::kTransposed>(
            state.output[box], TileDescriptor(kv + box * kBoxBytes + k * 16 * 128),
            TileDescriptor(probabilities + k * 32), true);
      }
    }
    sm90::ProductsCommit();
  }
  sm90::ProductsWait<2>();
  BarrierArriveIf(&shared.empty[stage][0], place.lane == 0);
  sm90::ProductsWait<1>();
  BarrierArriveIf(&shared.empty[stage][1], place.lane == 0);
  sm90::ProductsWait<0>();
  BarrierArriveIf(&shared.empty[stage][2], place.lane == 0);
}

// A whole sequence in one share: done.
__device__ void WriteOutput(const State& state, const float (&sums)[4], const Place& place,
                            __nv_bfloat16* out) {
#pragma unroll
  for (int piece = 0; piece < 8; ++piece) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      out[place.head(i) * kRank + piece * 64 + place.row(i)] =
          __float2bfloat16(state.output[piece][i] / sums[HeadSlot(i)]);
    }
  }
}

__device__ void WritePartial(const State& state, const float (&sums)[4], const Place& place,
                             int slot, int sequence, const Partials& partials) {
  float* target = partials.sums + int64_t{slot} * kOutputs;
#pragma unroll
  for (int piece = 0; piece < 8; ++piece) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      *reinterpret_cast<float2*>(&target[(piece * 64 + place.row(i)) * kHeads + place.head(i)]) =
          make_float2(state.output[piece][i], state.output[piece][i + 1]);
    }
  }
  if (place.warp == 0 && place.lane < 4) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int head = HeadOfSlot(place, s);
      partials.maxima[slot * 2 * kHeads + head] = state.largest[s];
      partials.maxima[slot * 2 * kHeads + kHeads + head] = sums[s];
    }
  }
  SyncThreads(kAllConsumers, kConsumers);
  if (place.thread == 0) {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(&partials.arrivals[sequence])
                 : "memory");
  }
}

// --- combining a sequence that several shares computed

struct SharedSequence {
  int sequence;
  int first_share;
  int num_shares;
  int mine;  // which of them this one is

  // The first of the shares begins the sequence after its own beginning, the others continue it.
  __device__ int Slot(int i) const { return 2 * (first_share + i) + (i == 0 ? 1 : 0); }
};

// `threads` threads, numbered from 0, under a named barrier of their own.
struct Team {
  int thread, threads, barrier;
  __device__ void Sync() const { SyncThreads(barrier, threads); }
};

// weights[i][head] = what part i counts in the result.
__device__ void CombineWeights(const SharedSequence& part, const Partials& partials,
                               const Team& team, float (*weights)[kHeads], float (*sums)[kHeads]) {
  constexpr int kInFlight = 4;
  const int pieces = part.num_shares * 8;  // of four floats
  for (int i = team.thread; i < pieces; i += team.threads * kInFlight) {
    float4 loaded[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int k = i + u * team.threads;
      if (k < pieces) {
        loaded[u] = __ldcg(reinterpret_cast<const float4*>(
            &partials.maxima[part.Slot(k / 8) * 2 * kHeads + k % 8 * 4]));
      }
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int k = i + u * team.threads, column = k % 8 * 4;
      if (k < pieces) {
        *reinterpret_cast<float4*>(column < kHeads ? &weights[k / 8][column]
                                                   : &sums[k / 8][column - kHeads]) = loaded[u];
      }
    }
  }
  team.Sync();
  const int per_head = team.threads / kHeads;  // 4 or 8 lanes side by side
  const int head = team.thread / per_head, lane = team.thread % per_head;
  float largest = -INFINITY, total = 0.0f;
  for (int i = lane; i < part.num_shares; i += per_head) largest = fmaxf(largest, weights[i][head]);
  for (int o = 1; o < per_head; o *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, o));
  }
  for (int i = lane; i < part.num_shares; i += per_head) {
    weights[i][head] = exp2f(weights[i][head] - largest);
    total += weights[i][head] * sums[i][head];
  }
  for (int o = 1; o < per_head; o *= 2) total += __shfl_xor_sync(~0u, total, o);
  for (int i = lane; i < part.num_shares; i += per_head) weights[i][head] /= total;
  team.Sync();
}

// Four heads of one row of the output: parts [first, …) in steps of `step`, kInFlight at a time.
__device__ float4 CombineFour(const SharedSequence& part, const Partials& partials,
                              const float (*weights)[kHeads], int position, int first, int step) {
  constexpr int kInFlight = 12;
  const int head = position % 4 * 4;
  float4 result = make_float4(0, 0, 0, 0);
  for (int i = first; i < part.num_shares; i += step * kInFlight) {
    float4 loaded[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int k = i + u * step;
      if (k < part.num_shares) {
        loaded[u] = __ldcg(reinterpret_cast<const float4*>(
            partials.sums + int64_t{part.Slot(k)} * kOutputs + position * 4));
      }
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int k = i + u * step;
      if (k < part.num_shares) {
        const float4 weight = *reinterpret_cast<const float4*>(&weights[k][head]);
        result.x += weight.x * loaded[u].x;
        result.y += weight.y * loaded[u].y;
        result.z += weight.z * loaded[u].z;
        result.w += weight.w * loaded[u].w;
      }
    }
  }
  return result;
}

// This share's slice of the sequence's output, once all of its parts are written. No share waits
// before it has written its own, and all of the grid is resident: nobody waits forever.
__device__ void Combine(const SharedSequence& part, const Partials& partials, const Team& team,
                        float (*scratch)[kHeads], float (*partial_sums)[4], __nv_bfloat16* out) {
  if (team.thread == 0) {
    int arrived;
    do {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                   : "=r"(arrived)
                   : "l"(&partials.arrivals[part.sequence])
                   : "memory");
    } while (arrived < part.num_shares);
  }
  team.Sync();
  float(*weights)[kHeads] = scratch;
  CombineWeights(part, partials, team, weights, scratch + kMaxShares);

  // Positions of four heads; threads to spare share a position's parts.
  const int begin = kRank * part.mine / part.num_shares * 4;
  const int end = kRank * (part.mine + 1) / part.num_shares * 4;
  const int positions = end - begin;
  int helpers = 1;
  while (positions * helpers * 2 <= team.threads && helpers * 8 <= part.num_shares) helpers *= 2;
  for (int offset = 0; offset < positions; offset += team.threads) {
    const int helper = helpers == 1 ? 0 : team.thread / positions;
    const int position = begin + offset + (helpers == 1 ? team.thread : team.thread % positions);
    const bool works = position < end && helper < helpers;
    float4 result = make_float4(0, 0, 0, 0);
    if (works) result = CombineFour(part, partials, weights, position, helper, helpers);
    if (helpers > 1) {
      *reinterpret_cast<float4*>(partial_sums[team.thread]) = result;
      team.Sync();
      for (int h = 1; works && helper == 0 && h < helpers; ++h) {
        const float4 more =
            *reinterpret_cast<const float4*>(partial_sums[team.thread + h * positions]);
        result.x += more.x;
        result.y += more.y;
        result.z += more.z;
        result.w += more.w;
      }
    }
    if (works && helper == 0) {
      __nv_bfloat16* target = out + position % 4 * 4 * kRank + position / 4;
      target[0 * kRank] = __float2bfloat16(result.x);
      target[1 * kRank] = __float2bfloat16(result.y);
      target[2 * kRank] = __float2bfloat16(result.z);
      target[3 * kRank] = __float2bfloat16(result.w);
    }
  }
}

// --- the kernel

__global__ __launch_bounds__(kThreads,
                             1) void DecodeKernel(const __grid_constant__ CUtensorMap blocks,
                                                  const __grid_constant__ CUtensorMap pieces,
                                                  const Arguments arguments) {
  extern __shared__ unsigned char dynamic_shared[];
  SharedMemory& shared = *reinterpret_cast<SharedMemory*>(
      (reinterpret_cast<uintptr_t>(dynamic_shared) + 1023) & ~uintptr_t{1023});
  const MlaDecodeSm90::Layer& layer = arguments.layer;
  const Place place = {static_cast<int>(threadIdx.x), static_cast<int>(threadIdx.x) / 32,
                       static_cast<int>(threadIdx.x) % 32};
  if (place.thread == kConsumers) {
    sm90::PrefetchMap(&blocks);
    for (int i = 0; i < kStages * kGroups; ++i) {
      sm90::BarrierInit(&shared.full[0][0] + i, 1);
      sm90::BarrierInit(&shared.empty[0][0] + i, kConsumers / 32);
    }
    sm90::BarrierInitFence();
  }
  sm90::WaitForPredecessors();
  const Share share = arguments.shares[blockIdx.x];
  const int total = share.total_units;
  const int num_shares = min(static_cast<int>(gridDim.x), total);
  const int me = blockIdx.x;
  sm90::LetDependentsLaunch();
  __syncthreads();
  if (me >= num_shares) return;
  const int begin = BeginOfShare(total, me, num_shares);
  const int end = BeginOfShare(total, me + 1, num_shares);
  if (place.thread >= kConsumers) {
    if (place.lane == 0) CopyShare(blocks, pieces, layer, share, begin, end, shared);
    return;
  }

  const int units_per_block = kBlockSize / share.unit_tokens;
  SharedSequence pending[2];
  int num_pending = 0;
  int tile = 0;
  int sequence = share.sequence;
  int start = share.sequence_start;
  for (int unit = begin; unit < end;) {
    const int context_len = layer.context_lens[sequence];
    const int units = UnitsOf(context_len, share.unit_tokens);
    const int stop = min(end, start + units);
    LoadQuery(layer, sequence, place, shared);
    State state = {};
#pragma unroll
    for (float& largest : state.largest) largest = -INFINITY;

    for (; unit < stop; ++tile) {
      const int first = unit - start;
      const int count = min(units_per_block - first % units_per_block, stop - unit);
      const int stage = tile % kStages;
      float scores[8];
      Scores(shared, stage, tile / kStages & 1, scores);
      const int valid = min(count * share.unit_tokens, context_len - first * share.unit_tokens);
      if (valid < kBlockSize) CutTail(shared, stage, valid, place, scores);
      Softmax(scores, arguments.scale_log2, place, shared, state);
      Accumulate(shared, stage, place, state);
      unit += count;
    }

    ReduceOverRows(state.sum, [](float a, float b) { return a + b; });
    ShareWarpValues(state.sum, place, shared);
    float sums[4];
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
      const int head = HeadOfSlot(place, slot);
      sums[slot] = shared.warp_values[0][head] + shared.warp_values[1][head] +
                   shared.warp_values[2][head] + shared.warp_values[3][head];
    }
    const int first_share = ShareOfUnit(total, start, num_shares);
    const int sharing = ShareOfUnit(total, start + units - 1, num_shares) - first_share + 1;
    if (sharing == 1) {
      WriteOutput(state, sums, place, layer.out + int64_t{sequence} * kOutputs);
    } else {
      pending[num_pending] = {sequence, first_share, sharing, me - first_share};
      const int slot = pending[num_pending].Slot(me - first_share);
      WritePartial(state, sums, place, slot, sequence, arguments.partials);
      ++num_pending;
    }
    SyncThreads(kAllConsumers, kConsumers);
    if (stop == start + units) {
      start += units;
      ++sequence;
    }
  }

  // A share's first and last sequence are combined side by side, by half of the threads each.
  if (num_pending == 0) return;
  const int half = num_pending == 2 ? place.thread / (kConsumers / 2) : 0;
  const Team team = {place.thread % (kConsumers / num_pending), kConsumers / num_pending, 2 + half};
  const SharedSequence& part = pending[half];
  Combine(part, arguments.partials, team, reinterpret_cast<float(*)[kHeads]>(shared.kv[half]),
          shared.combine + half * (kConsumers / 2), layer.out + int64_t{part.sequence} * kOutputs);
}

// --- the workspace: shares, partials, arrivals [layers][kMaxSequences]

struct Workspace {
  Share* shares;
  Partials partials;
  int64_t num_bytes;
};

Workspace Divide(void* base, int num_layers, int num_multiprocessors) {
  constexpr int64_t kAlignment = 256;
  Workspace result = {};
  const auto take = [&](int64_t num_bytes) {
    char* part = static_cast<char*>(base) + result.num_bytes;
    result.num_bytes += (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
    return static_cast<void*>(part);
  };
  const int64_t slots = 2LL * num_multiprocessors;
  result.shares = static_cast<Share*>(take(num_multiprocessors * sizeof(Share)));
  result.partials.sums = static_cast<float*>(take(slots * kOutputs * sizeof(float)));
  result.partials.maxima = static_cast<float*>(take(slots * 2 * kHeads * sizeof(float)));
  result.partials.arrivals =
      static_cast<int*>(take(int64_t{num_layers} * MlaDecodeSm90::kMaxSequences * sizeof(int)));
  return result;
}

constexpr int kSharedBytes = sizeof(SharedMemory) + sm90::kTileAlignment;

}  // namespace

int64_t MlaDecodeSm90::WorkspaceBytes(int num_layers, int num_multiprocessors) {
  // Addresses do not matter for the size.
  return Divide(nullptr, num_layers, num_multiprocessors).num_bytes;
}

bool MlaDecodeSm90::Supports(const cudaDeviceProp& device) {
  return device.major == 9 && device.minor == 0 && device.multiProcessorCount <= kMaxShares;
}

MlaDecodeSm90::MlaDecodeSm90(void* workspace, int num_layers, int num_multiprocessors)
    : workspace_(workspace), num_layers_(num_layers), num_multiprocessors_(num_multiprocessors) {
  CHECK_LE(num_multiprocessors, kMaxShares);
  CUDA_CHECK(cudaFuncSetAttribute(DecodeKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  kSharedBytes));
}

MlaDecodeSm90::CacheMaps MlaDecodeSm90::MapCache(void* cache, int64_t num_blocks) {
  const auto map = [&](int tokens) {
    return sm90::MapMatrix({.data = cache,
                            .type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                            .element_bytes = 2,
                            .rows = num_blocks * kBlockSize,
                            .columns = kWidth,
                            .box_rows = tokens,
                            .box_columns = 64});
  };
  return {.blocks = map(kBlockSize), .pieces = map(kPieceTokens)};
}

void MlaDecodeSm90::Schedule(const int* context_lens, int num_sequences,
                             cudaStream_t stream) const {
  CHECK(num_sequences >= 1 && num_sequences <= kMaxSequences);
  const Workspace workspace = Divide(workspace_, num_layers_, num_multiprocessors_);
  ScheduleKernel<<<1, 512, 0, stream>>>(context_lens, num_sequences, num_multiprocessors_,
                                        workspace.shares, workspace.partials.arrivals,
                                        num_layers_ * kMaxSequences);
  CUDA_CHECK(cudaGetLastError());
}

void MlaDecodeSm90::Run(const CacheMaps& cache, const Layer& layer, cudaStream_t stream) const {
  CHECK(layer.index >= 0 && layer.index < num_layers_);
  const Workspace workspace = Divide(workspace_, num_layers_, num_multiprocessors_);
  Arguments arguments = {.layer = layer,
                         .scale_log2 = layer.scale * static_cast<float>(M_LOG2E),
                         .shares = workspace.shares,
                         .partials = workspace.partials};
  arguments.partials.arrivals += layer.index * kMaxSequences;
  sm90::LaunchDependent(DecodeKernel, num_multiprocessors_, kThreads, kSharedBytes, stream,
                        cache.blocks, cache.pieces, arguments);
}

}  // namespace fathom
