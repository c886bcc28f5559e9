// Sorting the rows of a step by expert, by one block of threads: a counting sort that keeps the
// order, because each warp counts and later places a contiguous part of the rows.
#pragma once

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/expert_chunks.h"

namespace fathom::cuda {

struct Grouping {
  const int* experts;  // [num_rows]: of all ranks
  int num_rows;        // M
  int first_expert, num_experts;
  int rows_per_chunk;
  int* rows;     // [M]
  int* offsets;  // [E + 1]
  int* notes;    // null: nobody wants them
  int64_t places_at;

  // Shared memory of a block, in ints: counts of each warp, sums of each warp.
  static constexpr int SharedInts(int experts, int warps) {
    return (experts + 2) * warps + 2 * kWarp;
  }
};

// The sum of the values of the threads before this one, and of all threads. All threads.
__device__ inline int2 ScanBlock(int2 value, int* warp_sums, int2* total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int2 sum = value;
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int x = __shfl_up_sync(kAllLanes, sum.x, lanes);
    const int y = __shfl_up_sync(kAllLanes, sum.y, lanes);
    if (lane >= lanes) sum = make_int2(sum.x + x, sum.y + y);
  }
  __syncthreads();
  if (lane == kWarp - 1) {
    warp_sums[2 * warp] = sum.x;
    warp_sums[2 * warp + 1] = sum.y;
  }
  __syncthreads();
  int2 before = make_int2(sum.x - value.x, sum.y - value.y);
  *total = make_int2(0, 0);
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
    if (w == warp) before = make_int2(before.x + total->x, before.y + total->y);
    *total = make_int2(total->x + warp_sums[2 * w], total->y + warp_sums[2 * w + 1]);
  }
  return before;
}

// For at most 32 tokens whose rows of an expert fit into a chunk: bit t of an expert's mask says
// whether token t is among them, since no token chooses an expert twice. `experts`: [num_rows], in
// shared memory. All threads of a block.
__device__ inline void GroupFewRows(const Grouping& grouping, int choices, const int* experts,
                                    int* shared) {
  const int num_experts = grouping.num_experts;
  auto* masks = reinterpret_cast<unsigned*>(shared);
  int* places = shared + num_experts;
  int* warp_sums = places + num_experts;
  const auto local = [&](int row) {
    const int expert = experts[row] - grouping.first_expert;
    return expert >= 0 && expert < num_experts ? expert : -1;
  };
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) masks[e] = 0;
  __syncthreads();
  for (int row = threadIdx.x; row < grouping.num_rows; row += blockDim.x) {
    if (local(row) >= 0) atomicOr(&masks[local(row)], 1u << row / choices);
  }
  __syncthreads();
  int2 first = make_int2(0, 0);  // row, chunk
  for (int base = 0; base < num_experts; base += blockDim.x) {
    const int expert = base + threadIdx.x;
    const int count = expert < num_experts ? __popc(masks[expert]) : 0;
    int2 total;
    int2 before = ScanBlock(make_int2(count, count > 0 ? 1 : 0), warp_sums, &total);
    before = make_int2(before.x + first.x, before.y + first.y);
    if (expert < num_experts) {
      grouping.offsets[expert] = before.x;
      places[expert] = before.x;
    }
    if (count > 0 && grouping.notes != nullptr) {
      reinterpret_cast<int4*>(grouping.notes + kFirstChunkNote)[before.y] =
          make_int4(expert, before.x, count, 0);
    }
    first = make_int2(first.x + total.x, first.y + total.y);
  }
  if (threadIdx.x == 0) {
    grouping.offsets[num_experts] = first.x;
    if (grouping.notes != nullptr) grouping.notes[0] = first.y;
  }
  __syncthreads();
  for (int row = threadIdx.x; row < grouping.num_rows; row += blockDim.x) {
    const int expert = local(row);
    const unsigned earlier = (1u << row / choices) - 1;
    const int place = expert < 0 ? -1 : places[expert] + __popc(masks[expert] & earlier);
    if (expert >= 0) grouping.rows[place] = row;
    if (grouping.notes != nullptr) grouping.notes[grouping.places_at + row] = place;
  }
}

// By a whole block of at most 1,024 threads, all of its warps full.
__device__ inline void GroupRows(const Grouping& grouping, int* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int experts = grouping.num_experts;
  const int warps =
      max(1, min(static_cast<int>(blockDim.x) / kWarp, (grouping.num_rows + kWarp - 1) / kWarp));
  int* counts = shared;  // [warps][experts]
  int* warp_sums = counts + experts * warps;
  const int part = (grouping.num_rows + warps * kWarp - 1) / (warps * kWarp) * kWarp;
  const int begin = min(warp * part, grouping.num_rows);
  const int end = min(begin + part, grouping.num_rows);
  // Experts of a batch of this warp's rows, a row to a lane, all loads in flight at once; from the
  // L2, where other blocks have just put them. Behind the last row, and another rank's: -1.
  constexpr int kBatch = 18;  // all of 2,048 tokens of nine rows
  struct Batch {
    int experts[kBatch];
  };
  const auto load = [&](int first) {
    Batch batch;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = first + i * kWarp + lane;
      batch.experts[i] = row < end ? __ldcg(grouping.experts + row) - grouping.first_expert : -1;
    }
#pragma unroll
    for (int& expert : batch.experts) {
      if (expert >= experts || expert < 0) expert = -1;
    }
    return batch;
  };
  const Batch first_batch = load(begin);  // of few rows all
  // Calls fn(row, expert) for all rows of this warp in order.
  const auto visit = [&](const auto& fn) {
    for (int first = begin; first < end; first += kBatch * kWarp) {
      const Batch batch = first == begin ? first_batch : load(first);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i * kWarp >= end) break;
        fn(first + i * kWarp + lane, batch.experts[i]);
      }
    }
  };

  for (int i = threadIdx.x; i < experts * warps; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  visit([&](int, int expert) {
    if (expert >= 0) atomicAdd(&counts[warp * experts + expert], 1);
  });
  __syncthreads();

  // Counts become places: of an expert's first row, and of each warp's first row of it.
  int2 first = make_int2(0, 0);  // row, chunk
  for (int base = 0; base < experts; base += blockDim.x) {
    const int expert = base + threadIdx.x;
    int count = 0;
    if (expert < experts) {
#pragma unroll 8
      for (int w = 0; w < warps; ++w) count += counts[w * experts + expert];
    }
    const int chunk_rows = grouping.rows_per_chunk;
    const int chunks = (count + chunk_rows - 1) / chunk_rows;
    int2 total;
    int2 before = ScanBlock(make_int2(count, chunks), warp_sums, &total);
    before = make_int2(before.x + first.x, before.y + first.y);
    if (expert < experts) {
      grouping.offsets[expert] = before.x;
      int place = before.x;
      constexpr int kWarpsAtOnce = 8;
      for (int w = 0; w < warps; w += kWarpsAtOnce) {
        int of_warp[kWarpsAtOnce];
#pragma unroll
        for (int i = 0; i < kWarpsAtOnce; ++i) {
          of_warp[i] = w + i < warps ? counts[(w + i) * experts + expert] : 0;
        }
#pragma unroll
        for (int i = 0; i < kWarpsAtOnce; ++i) {
          if (w + i < warps) counts[(w + i) * experts + expert] = place;
          place += of_warp[i];
        }
      }
      for (int c = 0; grouping.notes != nullptr && c < chunks; ++c) {
        reinterpret_cast<int4*>(grouping.notes + kFirstChunkNote)[before.y + c] = make_int4(
            expert, before.x + c * chunk_rows, min(chunk_rows, count - c * chunk_rows), 0);
      }
    }
    first = make_int2(first.x + total.x, first.y + total.y);
  }
  if (threadIdx.x == 0) {
    grouping.offsets[experts] = first.x;
    if (grouping.notes != nullptr) grouping.notes[0] = first.y;
  }
  __syncthreads();

  visit([&](int row, int expert) {
    const unsigned same = __match_any_sync(kAllLanes, expert);
    int place = -1;
    if (expert >= 0) {
      place = counts[warp * experts + expert] + __popc(same & ((1u << lane) - 1));
      grouping.rows[place] = row;
    }
    __syncwarp();
    if (expert >= 0 && (same >> lane) == 1) counts[warp * experts + expert] = place + 1;
    __syncwarp();
    if (grouping.notes != nullptr && row < end) grouping.notes[grouping.places_at + row] = place;
  });
}

}  // namespace fathom::cuda
