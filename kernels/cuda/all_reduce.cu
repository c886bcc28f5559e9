#include "kernels/cuda/all_reduce.h"

#include <algorithm>

#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/peer_window.cuh"

namespace fathom::cuda {
namespace {

constexpr int kQuantizedColumns = 128;  // that share a factor
constexpr int kPiece = 4;               // elements of a packet or two, of a lane

// --- one shot

template <typename Act>
using Piece = Vector<Act, kPiece>;
template <typename Act>
constexpr int kPacketsOfPiece = kPiece * sizeof(Act) / 8;

template <typename Act>
__device__ Packet* PacketsOf(const PeerGroup& group, char* window, int sender, uint32_t call,
                             int64_t piece) {
  const int64_t bytes_per_sender = kPacketsBytes / group.world_size / 16 * 16;
  return reinterpret_cast<Packet*>(window + kPacketsOffset + (call & 1) * kPacketsBytes +
                                   sender * bytes_per_sender) +
         piece * kPacketsOfPiece<Act>;
}

template <typename Act>
__device__ void Send(const PeerGroup& group, uint32_t call, int64_t index,
                     const Piece<Act>& piece) {
  for (int i = 1; i < group.world_size; ++i) {
    const int peer =
        group.rank + i < group.world_size ? group.rank + i : group.rank + i - group.world_size;
    Packet* const to = PacketsOf<Act>(group, group.windows[peer], group.rank, call, index);
    const auto* words = reinterpret_cast<const uint32_t*>(&piece);
#pragma unroll
    for (int j = 0; j < kPacketsOfPiece<Act>; ++j) {
      StorePacket(to + j, Packet::Of(words + 2 * j, call));
    }
  }
}

// The sum of all ranks' pieces, rounded to Act; anything when patience is over.
template <typename Act>
__device__ Piece<Act> Receive(const PeerGroup& group, Patience& patience, uint32_t call,
                              int64_t index, const Piece<Act>& own) {
  constexpr int kPackets = kPacketsOfPiece<Act>;
  Packet packets[kMostPeers][kPackets];
  unsigned missing = ((1u << group.world_size) - 1) & ~(1u << group.rank);
  while (missing != 0) {
#pragma unroll
    for (int peer = 0; peer < kMostPeers; ++peer) {  // all loads under way at once
      if ((missing >> peer & 1) == 0) continue;
      const Packet* from = PacketsOf<Act>(group, group.windows[group.rank], peer, call, index);
#pragma unroll
      for (int j = 0; j < kPackets; ++j) packets[peer][j] = LoadPacket(from + j);
    }
#pragma unroll
    for (int peer = 0; peer < kMostPeers; ++peer) {
      if ((missing >> peer & 1) == 0) continue;
      bool is_there = true;
#pragma unroll
      for (int j = 0; j < kPackets; ++j) is_there = is_there && packets[peer][j].Has(call);
      if (is_there) missing &= ~(1u << peer);
    }
    if (missing != 0 && patience.GiveUp(__ffs(static_cast<int>(missing)) - 1)) return own;
  }
  float sums[kPiece];
#pragma unroll
  for (int peer = 0; peer < kMostPeers; ++peer) {
    if (peer >= group.world_size) continue;
    Piece<Act> part = own;
    if (peer != group.rank) {
      auto* words = reinterpret_cast<uint32_t*>(&part);
#pragma unroll
      for (int j = 0; j < kPackets; ++j) packets[peer][j].Unpack(words + 2 * j);
    }
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      const float value = ToFloat(part.elements[i]);
      sums[i] = peer == 0 ? value : sums[i] + value;
    }
  }
  Piece<Act> sum;
#pragma unroll
  for (int i = 0; i < kPiece; ++i) StoreFloat(sums[i], &sum.elements[i]);
  return sum;
}

constexpr int kOneShotThreads = 256;

template <typename Act>
__global__ void __launch_bounds__(kOneShotThreads)
    OneShotSumKernel(const __grid_constant__ PeerGroup group, Act* data, int64_t count) {
  const uint32_t call = BeginCall(group);
  Patience patience(group);
  const int64_t begin = int64_t{blockIdx.x} * kOneShotThreads + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * kOneShotThreads;
  for (int64_t i = begin; i * kPiece < count && !patience.gave_up(); i += step) {
    Send(group, call, i, Piece<Act>::Load(data + i * kPiece, count - i * kPiece));
  }
  for (int64_t i = begin; i * kPiece < count; i += step) {
    const int64_t valid = count - i * kPiece;
    const Piece<Act> own = Piece<Act>::Load(data + i * kPiece, valid);
    const Piece<Act> sum = Receive(group, patience, call, i, own);
    if (patience.gave_up()) break;
    sum.Store(data + i * kPiece, valid);
  }
  EndCall(group, call);
}

// --- residual, norm and quantising

struct NormTask {
  void *partial, *residual, *normed;
  const void* weight;
  uint8_t* values;
  float* scales;
  int64_t partial_stride, residual_stride, normed_stride, values_stride, scales_stride;
  int rows, columns;
  float eps;
  bool has_bf16_weight;
};

// What this lane multiplies its columns of every row with: those of FinishRow.
template <int kGroups>
struct Gains {
  __device__ Gains(const NormTask& task, int warp, int num_warps) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int column = (warp + i * num_warps) * kQuantizedColumns +
                         static_cast<int>(threadIdx.x) % kWarp * kPiece;
#pragma unroll
      for (int j = 0; j < kPiece; ++j) {
        values[i][j] = column + j >= task.columns ? 0.0f
                       : task.has_bf16_weight
                           ? ToFloat(static_cast<const __nv_bfloat16*>(task.weight)[column + j])
                           : static_cast<const float*>(task.weight)[column + j];
      }
    }
  }
  float values[kGroups][kPiece];
};

// Some warps' work on a row: adds the sums to the residual, norms, quantises. Each warp does the
// groups of 128 columns `warp`, `warp` + `num_warps`, …, kGroups at most, 4 columns a lane.
//   sum_of(column, num_valid) -> Piece<Act>: the sum over ranks
//   add_up(float) -> the sum over all threads that work on the row
template <typename Act, int kGroups, typename SumOf, typename AddUp>
__device__ void FinishRow(const NormTask& task, const Gains<kGroups>& gains, int row, int warp,
                          int num_warps, SumOf&& sum_of, AddUp&& add_up) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  Act* const residual = static_cast<Act*>(task.residual) + row * task.residual_stride;
  Piece<Act> kept[kGroups];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {  // before the sums, which may have to be waited for
    const int column = (warp + i * num_warps) * kQuantizedColumns + lane * kPiece;
    if (column < task.columns) {
      kept[i] = Piece<Act>::Load(residual + column, task.columns - column);
    }
  }
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int column = (warp + i * num_warps) * kQuantizedColumns + lane * kPiece;
    if (column >= task.columns) continue;
    const int valid = task.columns - column;
    const Piece<Act> sum = sum_of(column, valid);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      StoreFloat(ToFloat(kept[i].elements[j]) + ToFloat(sum.elements[j]), &kept[i].elements[j]);
      const float value = j < valid ? ToFloat(kept[i].elements[j]) : 0.0f;
      squares += value * value;
    }
    kept[i].Store(residual + column, valid);
  }
  const float mean = add_up(squares) / static_cast<float>(task.columns);
  const float factor = 1.0f / sqrtf(mean + task.eps);
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int group = warp + i * num_warps;
    const int column = group * kQuantizedColumns + lane * kPiece;
    if (group * kQuantizedColumns >= task.columns) continue;  // of the whole warp
    const int valid = task.columns - column;
    float largest = 0.0f;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      const float value =
          j < valid ? ToFloat(kept[i].elements[j]) * factor * gains.values[i][j] : 0.0f;
      StoreFloat(value, &kept[i].elements[j]);
      largest = fmaxf(largest, fabsf(ToFloat(kept[i].elements[j])));
    }
    if (task.normed != nullptr && valid > 0) {
      kept[i].Store(static_cast<Act*>(task.normed) + row * task.normed_stride + column, valid);
    }
    if (task.values == nullptr) continue;
    const float scale = fmaxf(WarpMax(largest), 1e-4f) / 448.0f;
    uint8_t* const values = task.values + row * task.values_stride + column;
    Vector<uint8_t, kPiece> quantized;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      quantized.elements[j] =
          __nv_cvt_float_to_fp8(ToFloat(kept[i].elements[j]) / scale, __NV_SATFINITE, __NV_E4M3);
    }
    quantized.Store(values, valid);
    if (lane == 0) task.scales[row * task.scales_stride + group] = scale;
  }
}

// The sum over a block's threads, in every thread.
__device__ float BlockSum(float value, float* warp_sums) {
  value = WarpSum(value);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.0f;
  for (unsigned i = 0; i < blockDim.x / kWarp; ++i) sum += warp_sums[i];
  return sum;
}

__device__ unsigned ClusterSize() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return size;
}
__device__ unsigned ClusterRank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ void ClusterSync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
__device__ void StoreInCluster(float* shared, unsigned rank, float value) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.f32 [remote], %2;\n}" ::"r"(address),
      "r"(rank), "f"(value)
      : "memory");
}

constexpr int kMostClusterBlocks = 8;
constexpr int kOneShotWarps = kOneShotThreads / kWarp;

// A cluster of blocks shares a row, so that few tokens are many threads' work.
template <typename Act, int kGroups>
__global__ void __launch_bounds__(kOneShotThreads)
    OneShotNormKernel(const __grid_constant__ PeerGroup group, const NormTask task) {
  __shared__ float warp_sums[kOneShotWarps];
  __shared__ float block_sums[2][kMostClusterBlocks];
  const auto num_blocks = static_cast<int>(ClusterSize());
  const auto block = static_cast<int>(ClusterRank());
  const int first_row = static_cast<int>(blockIdx.x) / num_blocks;
  const int row_step = static_cast<int>(gridDim.x) / num_blocks;
  const int warp = block * kOneShotWarps + static_cast<int>(threadIdx.x) / kWarp;
  const int num_warps = num_blocks * kOneShotWarps;
  const Gains<kGroups> gains(task, warp, num_warps);
  const uint32_t call = BeginCall(group);
  Patience patience(group);
  const int64_t pieces = (task.columns + kPiece - 1) / kPiece;
  const auto partial_at = [&](int row, int column) {
    return static_cast<const Act*>(task.partial) + row * task.partial_stride + column;
  };

  for (int row = first_row; row < task.rows && !patience.gave_up(); row += row_step) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int column = (warp + i * num_warps) * kQuantizedColumns +
                         static_cast<int>(threadIdx.x) % kWarp * kPiece;
      if (column >= task.columns) continue;
      Send(group, call, row * pieces + column / kPiece,
           Piece<Act>::Load(partial_at(row, column), task.columns - column));
    }
  }
  if (num_blocks > 1) ClusterSync();  // all blocks run: their shared memory may be written
  int parity = 0;
  for (int row = first_row; row < task.rows; row += row_step, parity ^= 1) {
    const auto sum_of = [&](int column, int valid) {
      const Piece<Act> own = Piece<Act>::Load(partial_at(row, column), valid);
      return Receive(group, patience, call, row * pieces + column / kPiece, own);
    };
    const auto add_up = [&](float squares) {
      const float sum = BlockSum(squares, warp_sums);
      if (num_blocks == 1) return sum;
      if (threadIdx.x < static_cast<unsigned>(num_blocks)) {
        StoreInCluster(&block_sums[parity][block], threadIdx.x, sum);
      }
      ClusterSync();  // who writes this parity again has met all others since they read it
      float total = 0.0f;
      for (int i = 0; i < num_blocks; ++i) total += block_sums[parity][i];
      return total;
    };
    FinishRow<Act, kGroups>(task, gains, row, warp, num_warps, sum_of, add_up);
  }
  EndCall(group, call);
}

// --- two shots
//
// The tensor is rows of `columns` elements, each cut into `segments` units. Unit u is owned by rank
// u % world_size, whose unit of index u / world_size it is, and goes through the blocks of that
// index, modulo their number, on all ranks.

struct Units {
  int64_t row_stride;  // elements
  int64_t columns;     // of a row; the last row of a flat tensor may be shorter
  int64_t count;       // elements of all rows together
  int num_units;
  int segments;      // of a row
  int unit_columns;  // of a unit but a row's last one
};

template <typename Act>
constexpr int kWide = 16 / sizeof(Act);

struct Unit {
  int64_t offset;  // elements from the tensor's first
  int size;        // elements, perhaps none
};
__device__ Unit UnitAt(const Units& units, int unit) {
  const int64_t row = unit / units.segments;
  const int64_t column = int64_t{unit % units.segments} * units.unit_columns;
  const int64_t row_size = min(units.columns, units.count - row * units.columns);
  const int64_t size = min(int64_t{units.unit_columns}, row_size - column);
  return {row * units.row_stride + column, static_cast<int>(max(size, int64_t{0}))};
}

constexpr int kTwoShotThreads = 512;

template <typename Act>
struct Staging {
  __device__ Staging(const PeerGroup& group, const Units& units)
      : unit_elements(units.unit_columns),
        owned((units.num_units + group.world_size - 1) / group.world_size) {}
  __device__ Act* Part(char* window, int sender, int index) const {
    return reinterpret_cast<Act*>(window + kPartsOffset) +
           (int64_t{sender} * owned + index) * unit_elements;
  }
  __device__ Act* Sum(char* window, int unit) const {
    return reinterpret_cast<Act*>(window + kSumsOffset) + int64_t{unit} * unit_elements;
  }

  const int unit_elements;
  const int owned;  // units of a rank, at most
};

// Both shots: the sums of all units are in this rank's staging memory once the second meeting with
// the blocks that made them is over.
template <typename Act>
__device__ void ExchangeUnits(const PeerGroup& group, Patience& patience, const Units& units,
                              const Staging<Act>& staging, const Act* data, uint32_t call) {
  using Wide = Vector<Act, kWide<Act>>;
  const int world = group.world_size;
  const int lane_begin = static_cast<int>(threadIdx.x) * kWide<Act>;
  constexpr int kLaneStep = kTwoShotThreads * kWide<Act>;
  if (__syncthreads_or(patience.gave_up()) != 0) return;  // nor write to others any more
  for (int index = blockIdx.x; index < staging.owned; index += gridDim.x) {
    for (int i = 1; i < world; ++i) {
      const int owner = (group.rank + i) % world;
      const int unit = index * world + owner;
      if (unit >= units.num_units) continue;
      const Unit at = UnitAt(units, unit);
      Act* const to = staging.Part(group.windows[owner], group.rank, index);
      for (int j = lane_begin; j < at.size; j += kLaneStep) {
        Wide::Load(data + at.offset + j, at.size - j).Store(to + j, kWide<Act>);
      }
    }
  }
  Announce(group, 0, 0, world, call);
  if (!Meet(group, patience, 0, 0, world, call)) return;

  for (int index = blockIdx.x; index < staging.owned; index += gridDim.x) {
    const int unit = index * world + group.rank;
    if (unit >= units.num_units) continue;
    const Unit at = UnitAt(units, unit);
    for (int j = lane_begin; j < at.size; j += kLaneStep) {
      Wide parts[kMostPeers];
#pragma unroll
      for (int peer = 0; peer < kMostPeers; ++peer) {
        if (peer >= world) continue;
        parts[peer] = peer == group.rank
                          ? Wide::Load(data + at.offset + j, at.size - j)
                          : *reinterpret_cast<const Wide*>(
                                staging.Part(group.windows[group.rank], peer, index) + j);
      }
      Wide sum;
#pragma unroll
      for (int k = 0; k < kWide<Act>; ++k) {
        float value = ToFloat(parts[0].elements[k]);
#pragma unroll
        for (int peer = 1; peer < kMostPeers; ++peer) {
          if (peer < world) value += ToFloat(parts[peer].elements[k]);
        }
        StoreFloat(value, &sum.elements[k]);
      }
      for (int i = 0; i < world; ++i) {
        const int peer = (group.rank + i) % world;
        *reinterpret_cast<Wide*>(staging.Sum(group.windows[peer], unit) + j) = sum;
      }
    }
  }
  Announce(group, 1, 0, world, call);
}

template <typename Act>
__global__ void __launch_bounds__(kTwoShotThreads)
    TwoShotSumKernel(const __grid_constant__ PeerGroup group, const Units units, Act* data) {
  using Wide = Vector<Act, kWide<Act>>;
  const uint32_t call = BeginCall(group);
  Patience patience(group);
  const Staging<Act> staging(group, units);
  ExchangeUnits(group, patience, units, staging, data, call);
  if (Meet(group, patience, 1, 0, group.world_size, call)) {
    for (int index = blockIdx.x; index < staging.owned; index += gridDim.x) {
      for (int owner = 0; owner < group.world_size; ++owner) {
        const int unit = index * group.world_size + owner;
        if (unit >= units.num_units) continue;
        const Unit at = UnitAt(units, unit);
        const Act* const from = staging.Sum(group.windows[group.rank], unit);
        for (int j = threadIdx.x * kWide<Act>; j < at.size; j += kTwoShotThreads * kWide<Act>) {
          reinterpret_cast<const Wide*>(from + j)->Store(data + at.offset + j, at.size - j);
        }
      }
    }
  }
  EndCall(group, call);
}

// A block per row once its units are there, whoever made them.
template <typename Act, int kGroups>
__global__ void __launch_bounds__(kTwoShotThreads)
    TwoShotNormKernel(const __grid_constant__ PeerGroup group, const Units units,
                      const NormTask task) {
  __shared__ float warp_sums[kTwoShotThreads / kWarp];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const Gains<kGroups> gains(task, warp, kTwoShotThreads / kWarp);
  const uint32_t call = BeginCall(group);
  Patience patience(group);
  const Staging<Act> staging(group, units);
  const int world = group.world_size;
  ExchangeUnits(group, patience, units, staging, static_cast<const Act*>(task.partial), call);
  for (int row = blockIdx.x; row < task.rows; row += gridDim.x) {
    const int unit_of_thread = row * units.segments + static_cast<int>(threadIdx.x);
    bool is_lost = false;
    if (static_cast<int>(threadIdx.x) < units.segments) {
      const int block = unit_of_thread / world % static_cast<int>(gridDim.x);
      patience.Await(1, block, unit_of_thread % world, call);
      is_lost = patience.gave_up();
    }
    if (__syncthreads_or(is_lost) != 0) break;
    const auto sum_of = [&](int column, int) {
      const int segment = column / units.unit_columns;
      const Act* sums = staging.Sum(group.windows[group.rank], row * units.segments + segment);
      return *reinterpret_cast<const Piece<Act>*>(sums + column % units.unit_columns);
    };
    const auto add_up = [&](float squares) { return BlockSum(squares, warp_sums); };
    FinishRow<Act, kGroups>(task, gains, row, warp, kTwoShotThreads / kWarp, sum_of, add_up);
  }
  EndCall(group, call);
}

// --- gathering

constexpr int kGatherThreads = 512;

__global__ void __launch_bounds__(kGatherThreads)
    GatherKernel(const __grid_constant__ PeerGroup group, const char* part, int64_t num_bytes,
                 int64_t slot_bytes, char* whole, int64_t whole_stride) {
  using Bytes = Vector<uint8_t, 16>;
  const uint32_t call = BeginCall(group);
  Patience patience(group);
  const int64_t begin = (int64_t{blockIdx.x} * kGatherThreads + threadIdx.x) * 16;
  const int64_t step = int64_t{gridDim.x} * kGatherThreads * 16;
  const auto* own = reinterpret_cast<const uint8_t*>(part);
  const int world = group.world_size;
  char* const staging = group.windows[0] + kPartsOffset;
  if (group.rank != 0) {
    auto* slot = reinterpret_cast<uint8_t*>(staging + group.rank * slot_bytes);
    for (int64_t i = begin; i < num_bytes; i += step) {
      Bytes::Load(own + i, num_bytes - i).Store(slot + i, 16);
    }
    Announce(group, 0, 0, 1, call);
    Meet(group, patience, 1, 0, 1, call);
  } else {
    auto* target = reinterpret_cast<uint8_t*>(whole);
    for (int64_t i = begin; i < num_bytes; i += step) {
      Bytes::Load(own + i, num_bytes - i).Store(target + i, num_bytes - i);
    }
    if (Meet(group, patience, 0, 1, world, call)) {
      for (int peer = 1; peer < world; ++peer) {
        const auto* slot = reinterpret_cast<const uint8_t*>(staging + peer * slot_bytes);
        for (int64_t i = begin; i < num_bytes; i += step) {
          reinterpret_cast<const Bytes*>(slot + i)->Store(target + peer * whole_stride + i,
                                                          num_bytes - i);
        }
      }
      Announce(group, 1, 1, world, call);
    }
  }
  EndCall(group, call);
}

// --- the host's side

int MostBlocks(const PeerGroup& group) {
  return group.shares_gpu ? kMostBlocksSharing : kMostBlocks;
}
int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether so many pieces, of all rows, are one-shot.
template <typename Act>
bool IsOneShot(const PeerGroup& group, int64_t pieces) {
  return pieces * kPacketsOfPiece<Act> * 16 <= kPacketsBytes / group.world_size / 16 * 16;
}

// Columns of a unit: a multiple of what shares a factor, and of what a thread copies.
constexpr int64_t kUnitColumns = 2048;

Units CutRows(int64_t rows, int64_t columns, int64_t stride) {
  const int64_t segments = CeilDiv(columns, kUnitColumns);
  const int64_t unit_columns =
      CeilDiv(CeilDiv(columns, segments), kQuantizedColumns) * kQuantizedColumns;
  return {.row_stride = stride,
          .columns = columns,
          .count = rows * columns,
          .num_units = static_cast<int>(rows * segments),
          .segments = static_cast<int>(segments),
          .unit_columns = static_cast<int>(unit_columns)};
}

// Most units of a launch, so that the parts fit when the last owners have one less.
template <typename Act>
int64_t MostUnits(const PeerGroup& group, const Units& units) {
  return kStagingBytes / (units.unit_columns * static_cast<int64_t>(sizeof(Act))) -
         group.world_size;
}

template <typename Act>
void Sum(const PeerGroup& group, Act* data, int64_t count, cudaStream_t stream) {
  if (IsOneShot<Act>(group, CeilDiv(count, kPiece))) {
    const int64_t blocks = CeilDiv(count, kPiece * kOneShotThreads);
    LaunchDependent(OneShotSumKernel<Act>,
                    {dim3(static_cast<unsigned>(std::min<int64_t>(blocks, MostBlocks(group)))),
                     dim3(kOneShotThreads)},
                    stream, group, data, count);
    return;
  }
  const int64_t most = MostUnits<Act>(group, CutRows(1, kUnitColumns, kUnitColumns)) * kUnitColumns;
  for (int64_t begin = 0; begin < count; begin += most) {
    const int64_t size = std::min(most, count - begin);
    Units units = CutRows(CeilDiv(size, kUnitColumns), kUnitColumns, kUnitColumns);
    units.count = size;
    const int64_t blocks = CeilDiv(units.num_units, group.world_size);
    LaunchDependent(TwoShotSumKernel<Act>,
                    {dim3(static_cast<unsigned>(std::min<int64_t>(blocks, MostBlocks(group)))),
                     dim3(kTwoShotThreads)},
                    stream, group, units, data + begin);
  }
}

NormTask TaskOf(const PeerAddRmsNorm& all, int64_t begin, int64_t end) {
  const auto stride = [](const Tensor& tensor) { return tensor.present() ? tensor.stride(0) : 0; };
  const auto rows = [&](const Tensor& tensor) {
    return tensor.present() ? tensor.Slice(0, begin, end).raw() : nullptr;
  };
  return {.partial = rows(all.partial),
          .residual = rows(all.residual),
          .normed = rows(all.normed),
          .weight = all.weight.raw(),
          .values = static_cast<uint8_t*>(rows(all.values)),
          .scales = static_cast<float*>(rows(all.scales)),
          .partial_stride = stride(all.partial),
          .residual_stride = stride(all.residual),
          .normed_stride = stride(all.normed),
          .values_stride = stride(all.values),
          .scales_stride = stride(all.scales),
          .rows = static_cast<int>(end - begin),
          .columns = static_cast<int>(all.partial.dim(1)),
          .eps = all.eps,
          .has_bf16_weight = all.weight.dtype() == DType::kBF16};
}

// Blocks of a cluster that share a row: enough for each warp to have one group, if that is
// possible.
int ClusterBlocks(int64_t columns) {
  const int64_t groups = CeilDiv(columns, kQuantizedColumns);
  int blocks = 1;
  while (blocks < kMostClusterBlocks && blocks * kOneShotWarps < groups) blocks *= 2;
  return blocks;
}

template <typename Act>
void SumAndNorm(const PeerGroup& group, const PeerAddRmsNorm& all, cudaStream_t stream) {
  const int64_t rows = all.partial.dim(0), columns = all.partial.dim(1);
  if (IsOneShot<Act>(group, rows * CeilDiv(columns, kPiece))) {
    const int cluster = ClusterBlocks(columns);
    const int64_t clusters = std::min<int64_t>(rows, MostBlocks(group) / cluster);
    const auto kernel = columns <= kMostClusterBlocks * kOneShotThreads * kPiece
                            ? OneShotNormKernel<Act, 1>
                            : OneShotNormKernel<Act, 2>;
    LaunchDependent(kernel,
                    {.blocks = dim3(static_cast<unsigned>(clusters * cluster)),
                     .threads = dim3(kOneShotThreads),
                     .cluster = cluster},
                    stream, group, TaskOf(all, 0, rows));
    return;
  }
  const int64_t segments = CutRows(1, columns, columns).segments;
  const int64_t most_rows = MostUnits<Act>(group, CutRows(1, columns, columns)) / segments;
  const auto kernel = columns <= 4 * kTwoShotThreads * kPiece ? TwoShotNormKernel<Act, 4>
                                                              : TwoShotNormKernel<Act, 8>;
  for (int64_t begin = 0; begin < rows; begin += most_rows) {
    const int64_t end = std::min(rows, begin + most_rows);
    const Units units = CutRows(end - begin, columns, all.partial.stride(0));
    const int64_t blocks = std::max(end - begin, CeilDiv(units.num_units, group.world_size));
    LaunchDependent(kernel,
                    {dim3(static_cast<unsigned>(std::min<int64_t>(blocks, MostBlocks(group)))),
                     dim3(kTwoShotThreads)},
                    stream, group, units, TaskOf(all, begin, end));
  }
}

}  // namespace

void AllReduceSum(const PeerGroup& group, void* data, DType dtype, int64_t count,
                  cudaStream_t stream) {
  if (count == 0) return;
  VisitAct(dtype, [&](auto act) { Sum(group, static_cast<decltype(act)*>(data), count, stream); });
}

void AllReduceAddRmsNorm(const PeerGroup& group, const PeerAddRmsNorm& task, cudaStream_t stream) {
  CHECK(task.partial.rank() == 2 && task.residual.rank() == 2) << task.partial.DebugString();
  CHECK_LE(task.partial.dim(1), kMostNormColumns);
  CHECK_EQ(task.residual.dim(0), task.partial.dim(0));
  CHECK_EQ(task.residual.dim(1), task.partial.dim(1));
  CHECK(task.residual.dtype() == task.partial.dtype());
  if (task.partial.dim(0) == 0) return;
  VisitAct(task.partial.dtype(), [&](auto act) { SumAndNorm<decltype(act)>(group, task, stream); });
}

void GatherToRank0(const PeerGroup& group, const void* part, int64_t num_bytes, void* whole,
                   cudaStream_t stream) {
  const int64_t slot_bytes = kStagingBytes / group.world_size / 16 * 16;
  for (int64_t begin = 0; begin < num_bytes; begin += slot_bytes) {
    const int64_t size = std::min(slot_bytes, num_bytes - begin);
    const int64_t blocks = std::min<int64_t>(CeilDiv(size, 16 * kGatherThreads), MostBlocks(group));
    LaunchDependent(GatherKernel, {dim3(static_cast<unsigned>(blocks)), dim3(kGatherThreads)},
                    stream, group, static_cast<const char*>(part) + begin, size, slot_bytes,
                    whole == nullptr ? nullptr : static_cast<char*>(whole) + begin, num_bytes);
  }
}

void LoadPeerKernels() {
  const auto load = [](auto* kernel) {
    cudaFuncAttributes attributes;
    CUDA_CHECK(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  };
  const auto load_all = [&](auto act) {
    using Act = decltype(act);
    load(OneShotSumKernel<Act>);
    load(TwoShotSumKernel<Act>);
    load(OneShotNormKernel<Act, 1>);
    load(OneShotNormKernel<Act, 2>);
    load(TwoShotNormKernel<Act, 4>);
    load(TwoShotNormKernel<Act, 8>);
  };
  load_all(float{});
  load_all(__nv_bfloat16{});
  load(GatherKernel);
}

}  // namespace fathom::cuda
