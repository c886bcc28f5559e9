// Combining what several clusters computed of one row, through device memory.
//
// Sums and maxima stand in "lane order": thread l of a warp accumulates four heads, those of quad
// q = l % 4, and entry 4q + j is head 2q + j % 2 + 8 (j / 2). A position is one output column of
// one quad: four heads, a float4; position 4c + q for column c.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>

#include "kernels/cuda/mla_decode_schedule.cuh"
#include "kernels/cuda/sm90.cuh"

namespace fathom::mla_decode {

constexpr int kHeads = MlaDecodeSm90::kHeads;
constexpr int kRank = MlaDecodeSm90::kKvLoraRank;
constexpr int kPositions = kRank * kHeads / 4;
constexpr int kMaximaFloats = 2 * kHeads;  // largest scores, then sums of exponentials

// A share can begin and end in the middle of a row, so it has two slots. Block r of a cluster holds
// the r-th slice of the positions.
struct Partials {
  float4* sums;   // [2 * shares][kPositions]: not normalised
  float* maxima;  // [2 * shares * cluster size][kMaximaFloats]
  int* arrivals;  // [shares * cluster size]: parts written of the row that this share begins
};

// A row that several shares computed.
struct CutRow {
  int token;
  int first_share;
  int num_parts;
  int part;  // this share's

  // The first of the shares begins the row after its own beginning, the others continue it.
  __device__ int Slot(int i) const { return 2 * (first_share + i) + (i == 0 ? 1 : 0); }
};

// `threads` threads, numbered from 0, under a named barrier of their own.
struct Team {
  int thread, threads, barrier;
  __device__ void Sync() const { sm90::SyncThreads(barrier, threads); }
};

struct CombineScratch {
  float weights[kMaxShares][kHeads];
  float sums[kMaxShares][kHeads];
  float4 results[128];
};

__device__ inline void AddScaled(float4 weight, float4 value, float4& sum) {
  sum.x += weight.x * value.x;
  sum.y += weight.y * value.y;
  sum.z += weight.z * value.z;
  sum.w += weight.w * value.w;
}

// One position of a row's output, [16, 512].
__device__ inline void StoreHeads(float4 value, int position, __nv_bfloat16* out) {
  __nv_bfloat16* target = out + position % 4 * 2 * kRank + position / 4;
  target[0 * kRank] = __float2bfloat16(value.x);
  target[1 * kRank] = __float2bfloat16(value.y);
  target[8 * kRank] = __float2bfloat16(value.z);
  target[9 * kRank] = __float2bfloat16(value.w);
}

// After the block's threads met: this part of the row is written.
__device__ inline void Announce(int* arrivals) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(arrivals) : "memory");
}
__device__ inline void AwaitArrivals(const int* arrivals, int count) {
  int arrived;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(arrived) : "l"(arrivals) : "memory");
  } while (arrived < count);
}

// scratch.weights[i][entry] = what part i counts in the result. `maxima` of part 0's slot 0.
__device__ inline void CombineWeights(const CutRow& row, const float* maxima, int slot_floats,
                                      const Team& team, CombineScratch& scratch) {
  for (int i = team.thread; i < row.num_parts * 8; i += team.threads) {
    const int column = i % 8 * 4;
    const float4 loaded =
        __ldcg(reinterpret_cast<const float4*>(&maxima[row.Slot(i / 8) * slot_floats + column]));
    *reinterpret_cast<float4*>(column < kHeads ? &scratch.weights[i / 8][column]
                                               : &scratch.sums[i / 8][column - kHeads]) = loaded;
  }
  team.Sync();
  const int per_head = team.threads / kHeads;  // 4 or 8 lanes side by side
  const int head = team.thread / per_head, lane = team.thread % per_head;
  float largest = -INFINITY, total = 0.0f;
  for (int i = lane; i < row.num_parts; i += per_head) {
    largest = fmaxf(largest, scratch.weights[i][head]);
  }
  for (int o = 1; o < per_head; o *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, o));
  }
  for (int i = lane; i < row.num_parts; i += per_head) {
    const float weight = exp2f(scratch.weights[i][head] - largest);
    scratch.weights[i][head] = weight;
    total += weight * scratch.sums[i][head];
  }
  for (int o = 1; o < per_head; o *= 2) total += __shfl_xor_sync(~0u, total, o);
  for (int i = lane; i < row.num_parts; i += per_head) scratch.weights[i][head] /= total;
  team.Sync();
}

// A thread's way through (position, part): all its parts of a position, then the next position.
struct Walk {
  int position, end, stride;          // positions
  int part, first_part, step, count;  // parts
  __device__ bool Done() const { return position >= end; }
  __device__ bool Present() const { return !Done() && part < count; }
  // Whether that was the position's last.
  __device__ bool Next() {
    part += step;
    if (part - first_part < count) return false;
    part = first_part;
    position += stride;
    return true;
  }
};

// This share's slice of the row's output, once all of its parts are written. No share waits before
// it has written its own, and all of the grid is resident: nobody waits forever.
template <int kCluster>
__device__ void Combine(const CutRow& row, int rank, const Partials& partials, const Team& team,
                        CombineScratch& scratch, __nv_bfloat16* out) {
  if (team.thread == 0) {
    AwaitArrivals(&partials.arrivals[row.first_share * kCluster + rank], row.num_parts);
  }
  team.Sync();

  // Threads to spare share a position's parts.
  constexpr int kSlice = kPositions / kCluster;
  const int begin = rank * kSlice + kSlice * row.part / row.num_parts;
  const int end = rank * kSlice + kSlice * (row.part + 1) / row.num_parts;
  const int positions = end - begin;
  int helpers = 1;
  while (positions * helpers * 2 <= team.threads && helpers * 8 <= row.num_parts) helpers *= 2;
  const int helper = helpers == 1 ? 0 : team.thread / positions;
  const bool works = helper < helpers;
  const int first = begin + (helpers == 1 ? team.thread : team.thread % positions);
  Walk ahead = {
      works ? first : end, end, helpers == 1 ? team.threads : positions, helper, helper, helpers,
      row.num_parts};
  Walk here = ahead;
  float4 result = make_float4(0, 0, 0, 0);
  bool weighed = false;
  // What is loaded does not depend on the weights: the first loads are on their way meanwhile.
  while (!weighed || !here.Done()) {
    constexpr int kInFlight = 16;
    float4 loaded[kInFlight];
#pragma unroll
    for (float4& value : loaded) {
      value = make_float4(0, 0, 0, 0);
      if (ahead.Present()) {
        value = __ldcg(&partials.sums[row.Slot(ahead.part) * kPositions + ahead.position]);
      }
      if (!ahead.Done()) ahead.Next();
    }
    if (!weighed) {
      CombineWeights(row, partials.maxima + rank * kMaximaFloats, kCluster * kMaximaFloats, team,
                     scratch);
      weighed = true;
    }
#pragma unroll
    for (const float4& value : loaded) {
      if (here.Done()) continue;
      if (here.Present()) {
        AddScaled(
            *reinterpret_cast<const float4*>(&scratch.weights[here.part][here.position % 4 * 4]),
            value, result);
      }
      const int position = here.position;
      if (here.Next() && helpers == 1) {
        StoreHeads(result, position, out);
        result = make_float4(0, 0, 0, 0);
      }
    }
  }
  if (helpers == 1) return;
  scratch.results[team.thread] = result;
  team.Sync();
  if (!works || helper > 0) return;
  for (int h = 1; h < helpers; ++h) {
    AddScaled(make_float4(1, 1, 1, 1), scratch.results[team.thread + h * positions], result);
  }
  StoreHeads(result, first, out);
}

}  // namespace fathom::mla_decode
