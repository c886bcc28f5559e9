// Sorting the rows of a step by expert, by one block of threads or by all of a kernel: a counting
// sort that keeps the order, because each warp counts and later places a contiguous part of the
// rows.
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
  // The same where several blocks group rows together: sums of the blocks, too.
  static constexpr int SharedIntsTogether(int experts, int warps) {
    return SharedInts(experts, warps) + 2 * experts;
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
  // Every warp adds up the warps' sums, one to a lane.
  const bool exists = lane < static_cast<int>(blockDim.x) / kWarp;
  int2 sums = exists ? make_int2(warp_sums[2 * lane], warp_sums[2 * lane + 1]) : make_int2(0, 0);
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int x = __shfl_up_sync(kAllLanes, sums.x, lanes);
    const int y = __shfl_up_sync(kAllLanes, sums.y, lanes);
    if (lane >= lanes) sums = make_int2(sums.x + x, sums.y + y);
  }
  *total = make_int2(__shfl_sync(kAllLanes, sums.x, kWarp - 1),
                     __shfl_sync(kAllLanes, sums.y, kWarp - 1));
  const int2 warps_before = make_int2(__shfl_sync(kAllLanes, sums.x, max(warp - 1, 0)),
                                      __shfl_sync(kAllLanes, sums.y, max(warp - 1, 0)));
  if (warp == 0) return make_int2(sum.x - value.x, sum.y - value.y);
  return make_int2(warps_before.x + sum.x - value.x, warps_before.y + sum.y - value.y);
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

// Consecutive rows of a step, divided among the warps of a block, each of which has a contiguous
// part. kBatch: how many of a lane's rows are asked for at once.
template <int kBatch>
class BlockRows {
 public:
  // Rows [first, end), which at most `warps` warps will do.
  __device__ BlockRows(const Grouping& grouping, int first, int end) : grouping_(grouping) {
    const int warp = threadIdx.x / kWarp;
    warps_ = max(1, min(static_cast<int>(blockDim.x) / kWarp, (end - first + kWarp - 1) / kWarp));
    const int part = (end - first + warps_ * kWarp - 1) / (warps_ * kWarp) * kWarp;
    begin_ = min(first + warp * part, end);
    end_ = min(begin_ + part, end);
    first_batch_ = Load(begin_);
  }

  __device__ int warps() const { return warps_; }
  __device__ bool Has(int row) const { return row < end_; }
  // Calls fn(row, expert) for all rows of this warp in order, a row to a lane; -1: another rank's
  // expert, or no row.
  template <typename Fn>
  __device__ void Visit(const Fn& fn) const {
    for (int first = begin_; first < end_; first += kBatch * kWarp) {
      const Batch batch = first == begin_ ? first_batch_ : Load(first);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i * kWarp >= end_) break;
        fn(first + i * kWarp + static_cast<int>(threadIdx.x) % kWarp, batch.experts[i]);
      }
    }
  }
  // counts[warp][expert] = how many of a warp's rows go to an expert. All threads.
  __device__ void Count(int* counts) const {
    const int experts = grouping_.num_experts, warp = threadIdx.x / kWarp;
    for (int i = threadIdx.x; i < experts * warps_; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    Visit([&](int, int expert) {
      if (expert >= 0) atomicAdd(&counts[warp * experts + expert], 1);
    });
    __syncthreads();
  }
  __device__ int CountOf(int expert, const int* counts) const {
    int count = 0;
#pragma unroll 8
    for (int w = 0; w < warps_; ++w) count += counts[w * grouping_.num_experts + expert];
    return count;
  }
  // Counts of an expert become places of each warp's first row of it, from `place` on.
  __device__ void Place(int expert, int place, int* counts) const {
    constexpr int kWarpsAtOnce = 8;
    int* of_expert = counts + expert;
    for (int w = 0; w < warps_; w += kWarpsAtOnce) {
      int of_warp[kWarpsAtOnce];
#pragma unroll
      for (int i = 0; i < kWarpsAtOnce; ++i) {
        of_warp[i] = w + i < warps_ ? of_expert[(w + i) * grouping_.num_experts] : 0;
      }
#pragma unroll
      for (int i = 0; i < kWarpsAtOnce; ++i) {
        if (w + i < warps_) of_expert[(w + i) * grouping_.num_experts] = place;
        place += of_warp[i];
      }
    }
  }
  // Writes where each row stands. All threads; `counts` as Place left them.
  __device__ void Store(int* counts) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int* places = counts + warp * grouping_.num_experts;
    Visit([&](int row, int expert) {
      const unsigned same = __match_any_sync(kAllLanes, expert);
      int place = -1;
      if (expert >= 0) {
        place = places[expert] + __popc(same & ((1u << lane) - 1));
        grouping_.rows[place] = row;
      }
      __syncwarp();
      if (expert >= 0 && (same >> lane) == 1) places[expert] = place + 1;
      __syncwarp();
      if (grouping_.notes != nullptr && Has(row)) {
        grouping_.notes[grouping_.places_at + row] = place;
      }
    });
  }

 private:
  struct Batch {
    int experts[kBatch];
  };

  // Experts of a batch of this warp's rows, all loads in flight at once; from the L2, where other
  // blocks have just put them.
  __device__ Batch Load(int first) const {
    Batch batch;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = first + i * kWarp + static_cast<int>(threadIdx.x) % kWarp;
      batch.experts[i] = row < end_ ? __ldcg(grouping_.experts + row) - grouping_.first_expert : -1;
    }
#pragma unroll
    for (int& expert : batch.experts) {
      if (expert >= grouping_.num_experts || expert < 0) expert = -1;
    }
    return batch;
  }

  const Grouping& grouping_;
  int warps_, begin_, end_;
  Batch first_batch_;  // of few rows all
};

// The first row of each expert, from how many it has: writes offsets and chunks if `writes`, and
// calls fn(expert, first row). All threads; count_of(expert) is the number of its rows.
template <typename CountOf, typename Fn>
__device__ void ScanExperts(const Grouping& grouping, int* warp_sums, bool writes,
                            const CountOf& count_of, const Fn& fn) {
  const int experts = grouping.num_experts, chunk_rows = grouping.rows_per_chunk;
  int2 first = make_int2(0, 0);  // row, chunk
  for (int base = 0; base < experts; base += blockDim.x) {
    const int expert = base + threadIdx.x;
    const int count = expert < experts ? count_of(expert) : 0;
    const int chunks = (count + chunk_rows - 1) / chunk_rows;
    int2 total;
    int2 before = ScanBlock(make_int2(count, chunks), warp_sums, &total);
    before = make_int2(before.x + first.x, before.y + first.y);
    if (expert < experts) fn(expert, before.x);
    if (expert < experts && writes) {
      grouping.offsets[expert] = before.x;
      for (int c = 0; grouping.notes != nullptr && c < chunks; ++c) {
        reinterpret_cast<int4*>(grouping.notes + kFirstChunkNote)[before.y + c] = make_int4(
            expert, before.x + c * chunk_rows, min(chunk_rows, count - c * chunk_rows), 0);
      }
    }
    first = make_int2(first.x + total.x, first.y + total.y);
  }
  if (threadIdx.x == 0 && writes) {
    grouping.offsets[experts] = first.x;
    if (grouping.notes != nullptr) grouping.notes[0] = first.y;
  }
  __syncthreads();
}

// By a whole block of at most 1,024 threads, all of its warps full.
__device__ inline void GroupRows(const Grouping& grouping, int* shared) {
  const BlockRows<18> rows(grouping, 0, grouping.num_rows);
  int* counts = shared;  // [warps][experts]
  int* warp_sums = counts + grouping.num_experts * rows.warps();
  rows.Count(counts);
  ScanExperts(
      grouping, warp_sums, true, [&](int expert) { return rows.CountOf(expert, counts); },
      [&](int expert, int place) { rows.Place(expert, place, counts); });
  rows.Store(counts);
}

// How many of a row of numbers, one per block, belong to all blocks and to those before `block`. A
// warp, which has asked for them: four to a lane.
struct BlockSums {
  __device__ BlockSums(int4 of_blocks, int block, int blocks) {
    const int first = static_cast<int>(threadIdx.x) % kWarp * 4;
    const int numbers[] = {of_blocks.x, of_blocks.y, of_blocks.z, of_blocks.w};
    int mine = 0, mine_before = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i < blocks) mine += numbers[i];
      if (first + i < block) mine_before += numbers[i];
    }
    all = __reduce_add_sync(kAllLanes, mine);
    before = __reduce_add_sync(kAllLanes, mine_before);
  }
  int all, before;
};

// All blocks of a kernel, all of which are resident: what they wrote before they met is visible to
// all behind. Two counters that are zero; whoever leaves last leaves them so.
__device__ inline void MeetBlocks(int* counters) {
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counters) : "memory");
    int arrived;
    do {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                   : "=r"(arrived)
                   : "l"(counters)
                   : "memory");
    } while (arrived < static_cast<int>(gridDim.x));
  }
  __syncthreads();
}
__device__ inline void LeaveBlocks(int* counters) {
  const int last = static_cast<int>(gridDim.x) - 1;
  if (threadIdx.x == 0 && atomicAdd(counters + 1, 1) == last) counters[0] = counters[1] = 0;
}

// As GroupRowsTogether, of so few rows that every block counts them all.
//   shared: 2 * experts, the block's rows, 2 * kWarp
__device__ inline void GroupSomeRowsTogether(const Grouping& grouping, int first, int end,
                                             int* counters, int* shared) {
  constexpr int kInFlight = 4;
  const int num_experts = grouping.num_experts;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int* all = shared;                // rows of an expert
  int* before = all + num_experts;  // of those, the ones before this block's
  int* warp_sums = before + num_experts;
  int* mine = warp_sums + 2 * kWarp;  // experts of this block's rows
  for (int e = threadIdx.x; e < 2 * num_experts; e += blockDim.x) shared[e] = 0;
  MeetBlocks(counters);
  for (int base = threadIdx.x; base < grouping.num_rows; base += kInFlight * blockDim.x) {
    int experts[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int row = base + i * blockDim.x;
      experts[i] = row < grouping.num_rows ? __ldcg(grouping.experts + row) : -1;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int row = base + i * blockDim.x, expert = experts[i] - grouping.first_expert;
      const bool is_here = row < grouping.num_rows && expert >= 0 && expert < num_experts;
      if (is_here) atomicAdd(&all[expert], 1);
      if (is_here && row < first) atomicAdd(&before[expert], 1);
      if (row >= first && row < end) mine[row - first] = is_here ? expert : -1;
    }
  }
  __syncthreads();
  ScanExperts(
      grouping, warp_sums, blockIdx.x == 0, [&](int expert) { return all[expert]; },
      [&](int expert, int place) { before[expert] += place; });
  LeaveBlocks(counters);
  if (warp > 0) return;
  for (int row = first + lane; row - lane < end; row += kWarp) {
    const int expert = row < end ? mine[row - first] : -1;
    const unsigned same = __match_any_sync(kAllLanes, expert);
    int place = -1;
    if (expert >= 0) {
      place = before[expert] + __popc(same & ((1u << lane) - 1));
      grouping.rows[place] = row;
    }
    __syncwarp();
    if (expert >= 0 && (same >> lane) == 1) before[expert] = place + 1;
    __syncwarp();
    if (grouping.notes != nullptr && row < end) grouping.notes[grouping.places_at + row] = place;
  }
}

// By all blocks of a kernel, at most kMostGroupingBlocks, all of which are resident: rows [first,
// end) are this one's, those of later blocks stand behind them.
//   block_counts [E, kMostGroupingBlocks]: room, 16-byte aligned
//   counters: two numbers that are zero, and are left so
//   shared: SharedIntsTogether
inline constexpr int kMostGroupingBlocks = 4 * kWarp;
__device__ inline void GroupRowsTogether(const Grouping& grouping, int first, int end,
                                         int* block_counts, int* counters, int* shared) {
  const int experts = grouping.num_experts;
  const auto blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  const BlockRows<4> rows(grouping, first, end);
  int* counts = shared;  // [warps][experts]
  int* sums =
      counts + experts * rows.warps();  // [experts] of all blocks, [experts] of those before
  int* warp_sums = sums + 2 * experts;
  rows.Count(counts);
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    block_counts[e * kMostGroupingBlocks + block] = rows.CountOf(e, counts);
  }
  MeetBlocks(counters);
  constexpr int kInFlight = 9;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  for (int e = threadIdx.x / kWarp; e < experts; e += kInFlight * warps) {
    int4 of_blocks[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int expert = min(e + i * warps, experts - 1);
      of_blocks[i] =
          __ldcg(reinterpret_cast<const int4*>(block_counts + expert * kMostGroupingBlocks) + lane);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int expert = e + i * warps;
      if (expert >= experts) break;
      const BlockSums of_expert(of_blocks[i], block, blocks);
      if (lane == 0) sums[expert] = of_expert.all;
      if (lane == 1) sums[experts + expert] = of_expert.before;
    }
  }
  __syncthreads();
  ScanExperts(
      grouping, warp_sums, block == 0, [&](int expert) { return sums[expert]; },
      [&](int expert, int place) { rows.Place(expert, place + sums[experts + expert], counts); });
  rows.Store(counts);
  LeaveBlocks(counters);
}

}  // namespace fathom::cuda
