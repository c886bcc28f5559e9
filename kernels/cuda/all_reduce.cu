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
#pragma unroll
    for (int j = 0; j < kPacketsOfPiece<Act>; ++j) {
      StorePacket(to + j, Packet::Of(piece.words + 2 * j, call));
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
#pragma unroll
      for (int j = 0; j < kPackets; ++j) packets[peer][j].Unpack(part.words + 2 * j);
    }
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      const float value = part[i];
      sums[i] = peer == 0 ? value : sums[i] + value;
    }
  }
  return Piece<Act>::Of(sums);
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

__device__ void LoadGains(const NormTask& task, int column, float (&gains)[kPiece]) {
  const int valid = task.columns - column;
  if (task.has_bf16_weight) {
    const auto* weight = static_cast<const __nv_bfloat16*>(task.weight);
    const auto piece = Piece<__nv_bfloat16>::Load(weight + column, valid);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) gains[j] = piece[j];
  } else {
    const auto* weight = static_cast<const float*>(task.weight);
    const auto piece = Piece<float>::Load(weight + column, valid);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) gains[j] = piece[j];
  }
}

// Some warps' work on a row: adds the sums to the residual, norms, quantises. Each warp does the
// groups of 128 columns `warp`, `warp` + `num_warps`, …, kGroups at most, 4 columns a lane.
//   sum_of(column, num_valid) -> Piece<Act>: the sum over ranks
//   add_up(float) -> the sum over all threads that work on the row
//   gains: the weight, of the columns of this lane
template <typename Act, int kGroups, typename SumOf, typename AddUp>
__device__ void FinishRow(const NormTask& task, int row, int warp, int num_warps,
                          const float (&gains)[kGroups][kPiece], SumOf&& sum_of, AddUp&& add_up) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  Act* const residual = static_cast<Act*>(task.residual) + row * task.residual_stride;
  Piece<Act> kept[kGroups], sums[kGroups];
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
    if (column < task.columns) sums[i] = sum_of(column, task.columns - column);
  }
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int column = (warp + i * num_warps) * kQuantizedColumns + lane * kPiece;
    if (column >= task.columns) continue;
    const int valid = task.columns - column;
    float values[kPiece];
#pragma unroll
    for (int j = 0; j < kPiece; ++j) values[j] = kept[i][j] + sums[i][j];
    kept[i] = Piece<Act>::Of(values);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) squares += j < valid ? kept[i][j] * kept[i][j] : 0.0f;
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
    float values[kPiece];
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      values[j] = j < valid ? kept[i][j] * factor * gains[i][j] : 0.0f;
    }
    kept[i] = Piece<Act>::Of(values);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) largest = fmaxf(largest, fabsf(kept[i][j]));
    if (task.normed != nullptr && valid > 0) {
      kept[i].Store(static_cast<Act*>(task.normed) + row * task.normed_stride + column, valid);
    }
    if (task.values == nullptr) continue;
    const float scale = fmaxf(WarpMax(largest), 1e-4f) / 448.0f;
    Vector<uint8_t, kPiece> codes = {};
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      const __nv_fp8_storage_t code =
          __nv_cvt_float_to_fp8(kept[i][j] / scale, __NV_SATFINITE, __NV_E4M3);
      codes.words[0] |= uint32_t{code} << 8 * j;
    }
    codes.Store(task.values + row * task.values_stride + column, valid);
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
constexpr int64_t kMostNormColumns = 2 * kMostClusterBlocks * kOneShotThreads * kPiece;
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
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float gains[kGroups][kPiece];  // read before predecessors are waited for
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    LoadGains(task, (warp + i * num_warps) * kQuantizedColumns + lane * kPiece, gains[i]);
  }
  const uint32_t call = BeginCall(group);
  Patience patience(group);
  const int64_t pieces = (task.columns + kPiece - 1) / kPiece;
  const auto partial_at = [&](int row, int column) {
    return static_cast<const Act*>(task.partial) + row * task.partial_stride + column;
  };

  for (int row = first_row; row < task.rows && !patience.gave_up(); row += row_step) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int column = (warp + i * num_warps) * kQuantizedColumns + lane * kPiece;
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
    FinishRow<Act, kGroups>(task, row, warp, num_warps, gains, sum_of, add_up);
  }
  EndCall(group, call);
}

// --- two shots
//
// The tensor is a row of units of 128 pieces of 16 bytes. Unit u is owned by rank u % world_size,
// whose unit of index u / world_size it is, and goes through the blocks of that index, modulo their
// number, on all ranks.

constexpr int kUnitPieces = 128;
constexpr int kTwoShotThreads = 512;

template <typename Act>
class TwoShots {
 public:
  using Wide = Vector<Act, 16 / sizeof(Act)>;
  static constexpr int kWide = 16 / sizeof(Act);

  __device__ TwoShots(const PeerGroup& group, Act* data, int64_t count)
      : group_(group), data_(data), count_(count) {
    constexpr int kUnitElements = kUnitPieces * kWide;
    const auto num_units = static_cast<int>((count + kUnitElements - 1) / kUnitElements);
    owned_ = (num_units + group.world_size - 1) / group.world_size;
  }

  // Gives every owner this rank's part.
  __device__ void SendParts() const {
    Copy(group_.rank + 1, group_.world_size - 1, [&](const Place& at) {
      const Wide part = Load(at);
      return [=, this] { *Part(group_.windows[at.owner], group_.rank, at) = part; };
    });
  }
  // Sums what this rank owns and gives it to all.
  __device__ void SendSums() const {
    const int world = group_.world_size;
    for (int i = threadIdx.x; i < NumPieces(1); i += kTwoShotThreads) {
      const Place at = PlaceOf(i, group_.rank, 1);
      if (!IsThere(at)) continue;
      Wide parts[kMostPeers];
#pragma unroll
      for (int peer = 0; peer < kMostPeers; ++peer) {
        if (peer >= world) continue;
        parts[peer] = peer == group_.rank ? Load(at) : *Part(group_.windows[group_.rank], peer, at);
      }
      float sums[kWide];
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        sums[j] = parts[0][j];
#pragma unroll
        for (int peer = 1; peer < kMostPeers; ++peer) {
          if (peer < world) sums[j] += parts[peer][j];
        }
      }
      const Wide sum = Wide::Of(sums);
      for (int peer = 0; peer < world; ++peer) {
        *Sum(group_.windows[(group_.rank + peer) % world], at) = sum;
      }
    }
  }
  // Takes all sums to their places in the tensor.
  __device__ void TakeSums() const {
    Copy(0, group_.world_size, [&](const Place& at) {
      const Wide sum = *Sum(group_.windows[group_.rank], at);
      return [=, this] { sum.Store(data_ + Begin(at), count_ - Begin(at)); };
    });
  }

 private:
  struct Place {
    int index, owner;  // of the unit
    int piece;         // within it
  };

  // Of the units of this block that so many ranks own.
  __device__ int NumPieces(int num_ranks) const {
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    const int indices = block < owned_ ? (owned_ - block + blocks - 1) / blocks : 0;
    return indices * num_ranks * kUnitPieces;
  }
  // Of the ranks first, first + 1, …, modulo world_size. Neighbours have neighbouring pieces.
  __device__ Place PlaceOf(int i, int first, int num_ranks) const {
    const int unit = i / kUnitPieces, round = unit / num_ranks;
    return {.index = static_cast<int>(blockIdx.x + round * gridDim.x),
            .owner = (first + unit - round * num_ranks) % group_.world_size,
            .piece = i % kUnitPieces};
  }
  __device__ int64_t Begin(const Place& at) const {  // elements
    const int64_t unit = int64_t{at.index} * group_.world_size + at.owner;
    return (unit * kUnitPieces + at.piece) * kWide;
  }
  __device__ bool IsThere(const Place& at) const { return Begin(at) < count_; }
  __device__ Wide Load(const Place& at) const {
    return Wide::Load(data_ + Begin(at), count_ - Begin(at));
  }
  __device__ Wide* Part(char* window, int sender, const Place& at) const {
    return reinterpret_cast<Wide*>(window + kPartsOffset) +
           (int64_t{sender} * owned_ + at.index) * kUnitPieces + at.piece;
  }
  __device__ Wide* Sum(char* window, const Place& at) const {
    return reinterpret_cast<Wide*>(window + kSumsOffset) + Begin(at) / kWide;
  }

  // Calls load(place), which gives a function that stores: several loads before their stores.
  template <typename LoadPiece>
  __device__ void Copy(int first, int num_ranks, LoadPiece&& load) const {
    const int count = NumPieces(num_ranks);
    int i = static_cast<int>(threadIdx.x);
    for (; i + 3 * kTwoShotThreads < count; i += 4 * kTwoShotThreads) {
      const Place places[] = {PlaceOf(i, first, num_ranks),
                              PlaceOf(i + kTwoShotThreads, first, num_ranks),
                              PlaceOf(i + 2 * kTwoShotThreads, first, num_ranks),
                              PlaceOf(i + 3 * kTwoShotThreads, first, num_ranks)};
      if (!IsThere(places[0]) || !IsThere(places[1]) || !IsThere(places[2]) ||
          !IsThere(places[3])) {
        break;
      }
      const auto a = load(places[0]), b = load(places[1]), c = load(places[2]), d = load(places[3]);
      a(), b(), c(), d();
    }
    for (; i < count; i += kTwoShotThreads) {
      const Place at = PlaceOf(i, first, num_ranks);
      if (IsThere(at)) load(at)();
    }
  }

  const PeerGroup& group_;
  Act* const data_;
  const int64_t count_;
  int owned_;  // units of a rank, at most
};

template <typename Act>
__global__ void __launch_bounds__(kTwoShotThreads)
    TwoShotSumKernel(const __grid_constant__ PeerGroup group, Act* data, int64_t count) {
  const uint32_t call = BeginCall(group);
  Patience patience(group);
  const int world = group.world_size;
  const TwoShots<Act> shots(group, data, count);
  if (__syncthreads_or(patience.gave_up()) == 0) {  // else nor write to others any more
    shots.SendParts();
    Announce(group, 0, 0, world, call);
    if (Meet(group, patience, 0, 0, world, call)) {
      shots.SendSums();
      Announce(group, 1, 0, world, call);
      if (Meet(group, patience, 1, 0, world, call)) shots.TakeSums();
    }
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
  // The parts must fit when the last owners have a unit less.
  constexpr int64_t kUnitElements = kUnitPieces * TwoShots<Act>::kWide;
  const int64_t most_units = kStagingBytes / (kUnitPieces * 16) - group.world_size;
  const int64_t most = most_units * kUnitElements;
  for (int64_t begin = 0; begin < count; begin += most) {
    const int64_t size = std::min(most, count - begin);
    const int64_t blocks = CeilDiv(size, kUnitElements * group.world_size);
    LaunchDependent(TwoShotSumKernel<Act>,
                    {dim3(static_cast<unsigned>(std::min<int64_t>(blocks, MostBlocks(group)))),
                     dim3(kTwoShotThreads)},
                    stream, group, data + begin, size);
  }
}

NormTask TaskOf(const PeerAddRmsNorm& all) {
  const auto stride = [](const Tensor& tensor) { return tensor.present() ? tensor.stride(0) : 0; };
  return {.partial = all.partial.raw(),
          .residual = all.residual.raw(),
          .normed = all.normed.raw(),
          .weight = all.weight.raw(),
          .values = static_cast<uint8_t*>(all.values.raw()),
          .scales = static_cast<float*>(all.scales.raw()),
          .partial_stride = stride(all.partial),
          .residual_stride = stride(all.residual),
          .normed_stride = stride(all.normed),
          .values_stride = stride(all.values),
          .scales_stride = stride(all.scales),
          .rows = static_cast<int>(all.partial.dim(0)),
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
  const int cluster = ClusterBlocks(columns);
  const int64_t clusters = std::min<int64_t>(rows, MostBlocks(group) / cluster);
  const auto kernel = columns <= kMostClusterBlocks * kOneShotThreads * kPiece
                          ? OneShotNormKernel<Act, 1>
                          : OneShotNormKernel<Act, 2>;
  LaunchDependent(kernel,
                  {.blocks = dim3(static_cast<unsigned>(clusters * cluster)),
                   .threads = dim3(kOneShotThreads),
                   .cluster = cluster},
                  stream, group, TaskOf(all));
}

}  // namespace

void AllReduceSum(const PeerGroup& group, void* data, DType dtype, int64_t count,
                  cudaStream_t stream) {
  if (count == 0) return;
  VisitAct(dtype, [&](auto act) { Sum(group, static_cast<decltype(act)*>(data), count, stream); });
}

bool CanAllReduceAddRmsNorm(const PeerGroup& group, DType dtype, int64_t rows, int64_t columns) {
  const int64_t pieces = rows * CeilDiv(columns, kPiece);
  return columns <= kMostNormColumns &&
         (dtype == DType::kF32 ? IsOneShot<float>(group, pieces)
                               : IsOneShot<__nv_bfloat16>(group, pieces));
}

void AllReduceAddRmsNorm(const PeerGroup& group, const PeerAddRmsNorm& task, cudaStream_t stream) {
  CHECK(task.partial.rank() == 2 && task.residual.rank() == 2) << task.partial.DebugString();
  CHECK(
      CanAllReduceAddRmsNorm(group, task.partial.dtype(), task.partial.dim(0), task.partial.dim(1)))
      << task.partial.DebugString();
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
  };
  load_all(float{});
  load_all(__nv_bfloat16{});
  load(GatherKernel);
}

}  // namespace fathom::cuda
