#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/mla_decode_schedule.cuh"

namespace fathom::mla_decode {
namespace {

constexpr int kThreads = 1024;
static_assert(kThreads >= MlaDecodeSm90::kMaxRows && kThreads > kMaxShares);

// A multiprocessor with fewer units than this gains less by giving half of them away than the
// combining costs.
constexpr int kWorthwhileUnits = 10;

struct Step {
  MlaDecodeSm90::Rows rows;
  int num_clusters;
  int cluster_size;
  Plan plan;
  int* counters;
  int num_counters;
};

struct Cuts {
  int starts[MlaDecodeSm90::kMaxRows + 1];  // unit that the row begins with
  int bounds[kMaxShares + 1];               // unit that the share begins with
  int warp_sums[kThreads / 32];
};

__device__ int UnitsOf(int context_len) { return (context_len + kUnitTokens - 1) / kUnitTokens; }

// The last entry of ascending values[0, count) that is at most `value`.
__device__ int LastAtMost(const int* values, int count, int value) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (values[middle] <= value) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Shares that end where rows end, although fewer: a multiprocessor may have this many units more
// for it, as long as combining takes.
constexpr int kCombiningUnits = 22;

__device__ int WholeOrMost(int whole, int most, int total_units, const Step& step) {
  const int extra =
      total_units / (whole * step.cluster_size) - total_units / (most * step.cluster_size);
  return extra <= kCombiningUnits ? whole : most;
}

__device__ int SharesWorthwhile(int total_units, const Step& step) {
  const int rows = step.rows.count, most = step.num_clusters;
  if (rows > most) {
    const int rows_per_share = (rows + most - 1) / most;
    const int whole = (rows + rows_per_share - 1) / rows_per_share;
    return WholeOrMost(whole, most, total_units, step);
  }
  const int worthwhile = total_units / (step.cluster_size * kWorthwhileUnits);
  const int shares = max(min(worthwhile, most), rows);
  return WholeOrMost(shares / rows * rows, shares, total_units, step);
}

// Exclusive prefix sums of the rows' units.
__device__ void SumUnits(const Step& step, Cuts& cuts) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int units = thread < step.rows.count ? UnitsOf(step.rows.context_lens[thread]) : 0;
  int sum = units;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int before = __shfl_up_sync(~0u, sum, offset);
    if (lane >= offset) sum += before;
  }
  if (lane == 31) cuts.warp_sums[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    int total = cuts.warp_sums[lane];
    for (int offset = 1; offset < 32; offset *= 2) {
      const int before = __shfl_up_sync(~0u, total, offset);
      if (lane >= offset) total += before;
    }
    cuts.warp_sums[lane] = total;
  }
  __syncthreads();
  const int before = warp == 0 ? 0 : cuts.warp_sums[warp - 1];
  if (thread < step.rows.count) cuts.starts[thread] = before + sum - units;
  if (thread == step.rows.count - 1) cuts.starts[thread + 1] = before + sum;
  __syncthreads();
}

// Equal shares; a cut that falls near the end of a row moves there.
__device__ int Bound(const Step& step, const Cuts& cuts, int share, int num_shares) {
  const int rows = step.rows.count, total = cuts.starts[rows];
  const auto exact = static_cast<int>(static_cast<long long>(total) * share / num_shares);
  if (share == 0 || share == num_shares) return exact;
  const int tolerance = total / num_shares / 5;
  const int row = LastAtMost(cuts.starts, rows, exact);
  const int before = exact - cuts.starts[row], after = cuts.starts[row + 1] - exact;
  if (min(before, after) > tolerance) return exact;
  return before <= after ? cuts.starts[row] : cuts.starts[row + 1];
}

// The part of `row` that lies in `share`.
__device__ Item ItemOf(const Step& step, const Cuts& cuts, int row, int share, int num_shares) {
  const MlaDecodeSm90::Rows& rows = step.rows;
  const int start = cuts.starts[row];
  const int first = LastAtMost(cuts.bounds, num_shares, start);
  const int last = LastAtMost(cuts.bounds, num_shares, cuts.starts[row + 1] - 1);
  int oldest = row;  // of this sequence's rows: its token is the first that this step writes
  if (rows.sequences != nullptr) {
    while (oldest > 0 && rows.sequences[oldest - 1] == rows.sequences[row]) --oldest;
  }
  Item item = {};
  item.token = rows.tokens != nullptr ? rows.tokens[row] : row;
  item.sequence = rows.sequences != nullptr ? rows.sequences[row] : row;
  item.begin = max(cuts.bounds[share] - start, 0) * kUnitTokens;
  item.end = min(rows.context_lens[row], (cuts.bounds[share + 1] - start) * kUnitTokens);
  item.fresh = rows.context_lens[oldest] - 1;
  item.part = share - first;
  item.num_parts = last - first + 1;
  return item;
}

__global__ __launch_bounds__(kThreads) void ScheduleKernel(const Step step) {
  __shared__ Cuts cuts;
  const int thread = threadIdx.x, rows = step.rows.count;
  for (int i = thread; i < step.num_counters; i += kThreads) step.counters[i] = 0;
  SumUnits(step, cuts);
  const int total = cuts.starts[rows];
  const int num_shares = min(SharesWorthwhile(total, step), total);
  if (thread <= num_shares) cuts.bounds[thread] = Bound(step, cuts, thread, num_shares);
  __syncthreads();
  if (thread < step.num_clusters) {
    Share share = {};
    share.last_row = -1;
    if (thread < num_shares) {
      share.first_row = LastAtMost(cuts.starts, rows, cuts.bounds[thread]);
      share.last_row = LastAtMost(cuts.starts, rows, cuts.bounds[thread + 1] - 1);
      share.first = ItemOf(step, cuts, share.first_row, thread, num_shares);
    }
    step.plan.shares[thread] = share;
  }
  if (thread < rows) {
    const int share = LastAtMost(cuts.bounds, num_shares, cuts.starts[thread]);
    step.plan.later[thread] = ItemOf(step, cuts, thread, share, num_shares);
  }
}

}  // namespace

void Schedule(const MlaDecodeSm90::Rows& rows, int num_clusters, int cluster_size, const Plan& plan,
              int* counters, int num_counters, cudaStream_t stream) {
  ScheduleKernel<<<1, kThreads, 0, stream>>>(
      {rows, num_clusters, cluster_size, plan, counters, num_counters});
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace fathom::mla_decode
