#include "kernels/cuda/mla_decode_sm90.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <type_traits>

#include "base/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/mla_decode_combine.cuh"
#include "kernels/cuda/mla_decode_schedule.cuh"
#include "kernels/cuda/mla_decode_tiles.cuh"
#include "kernels/cuda/sm90.cuh"
#include "kernels/cuda/sm90_launch.h"

namespace fathom {
namespace mla_decode {
namespace {

using sm90::OperandA;
using sm90::PackBf16;
using sm90::SharedAddress;
using sm90::SyncThreads;
using sm90::TileDescriptor;

constexpr int kTileTokens = 64;
constexpr int kMaxCluster = 16;

// --- the warpgroup that computes

// Where this thread's accumulators stand (sm90.cuh): heads head(i), rows (tokens or outputs) row(i)
// of 64.
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

__device__ void LoadQuery(const MlaDecodeSm90::Layer& layer, int token, const Place& place,
                          unsigned char* query) {
  constexpr int kPieces = kPanels * kHeads * 8 / kConsumers;  // of 16 bytes, per thread
  const __nv_bfloat16* latent = layer.q_latent + int64_t{token} * kHeads * kRank;
  const __nv_bfloat16* rope = layer.q_rope + token * layer.q_rope_token_stride;
  uint4 loaded[kPieces];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int head = place.thread / 8, piece = place.thread % 8;
    const __nv_bfloat16* source =
        p < kLatentPanels ? latent + head * kRank + p * 64 : rope + head * layer.q_rope_head_stride;
    loaded[p] = *reinterpret_cast<const uint4*>(source + piece * 8);
  }
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int head = place.thread / 8, piece = place.thread % 8;
    *reinterpret_cast<uint4*>(query + p * kQueryPanelBytes + head * 128 +
                              ((piece ^ (head & 7)) * 16)) = loaded[p];
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
                                float (*warp_values)[kHeads]) {
  if (place.lane < 4) {
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
      warp_values[place.warp][HeadOfSlot(place, slot)] = values[slot];
    }
  }
  SyncThreads(kAllConsumers, kConsumers);
}

// The running state of one row's part: softmax with a running maximum.
struct State {
  float output[kLatentPanels][8];  // O' in eight pieces of 64 rows
  float largest[4];                // score · log2(e), per head slot
  float sum[4];                    // of exponentials; until FinishSums of this thread's rows only

  __device__ float4 Largest() const {
    return make_float4(largest[0], largest[1], largest[2], largest[3]);
  }
  __device__ float4 Sum() const { return make_float4(sum[0], sum[1], sum[2], sum[3]); }
  // This thread's quad of heads in row `half` (0 or 1: row + 8) of a piece.
  __device__ float4 Quad(int piece, int half) const {
    const float* values = output[piece];
    return half == 0 ? make_float4(values[0], values[1], values[4], values[5])
                     : make_float4(values[2], values[3], values[6], values[7]);
  }
};

__device__ void Scores(uint32_t kv, uint32_t query, float (&scores)[8]) {
  sm90::ProductsBegin();
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sm90::ProductBf16N16<OperandA::kAsStored>(
          scores, TileDescriptor<kGroupBytes>(kv + panel * kPanelBytes + k * 32),
          TileDescriptor(query + panel * kQueryPanelBytes + k * 32), (panel | k) != 0);
    }
  }
  sm90::ProductsCommit();
  sm90::ProductsWait<0>();
}

// Tokens of the tile from `valid` on do not exist: their scores count nothing, and what stands
// there, which may be anything, becomes zero as far as it is multiplied (zero times NaN is NaN).
__device__ void CutTail(unsigned char* kv, int valid, const Place& place, float (&scores)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (place.row(i) >= valid) scores[i] = -INFINITY;
  }
  const int multiplied = (valid + 15) / 16 * 16;
  for (int i = place.thread; i < (multiplied - valid) * kLatentPanels * 8; i += kConsumers) {
    const int token = valid + i / (kLatentPanels * 8), panel = i / 8 % kLatentPanels;
    *reinterpret_cast<uint4*>(kv + token / kGroupTokens * kGroupBytes + panel * kPanelBytes +
                              token % kGroupTokens * 128 + i % 8 * 16) = make_uint4(0, 0, 0, 0);
  }
}

// Scores to probabilities P' in shared memory, with the running maximum; what is older shrinks.
__device__ void Softmax(const float (&scores)[8], float scale_log2, const Place& place,
                        unsigned char* probabilities, float (*warp_values)[kHeads], State& state) {
  float tile_largest[4] = {fmaxf(scores[0], scores[2]), fmaxf(scores[1], scores[3]),
                           fmaxf(scores[4], scores[6]), fmaxf(scores[5], scores[7])};
  ReduceOverRows(tile_largest, [](float a, float b) { return fmaxf(a, b); });
  ShareWarpValues(tile_largest, place, warp_values);
  float shrink[4];
#pragma unroll
  for (int slot = 0; slot < 4; ++slot) {
    const int head = HeadOfSlot(place, slot);
    const float largest = fmaxf(fmaxf(warp_values[0][head], warp_values[1][head]),
                                fmaxf(warp_values[2][head], warp_values[3][head]));
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
    *reinterpret_cast<__nv_bfloat16*>(probabilities + head * 128 +
                                      (((token >> 3) ^ (head & 7)) * 16) + (token & 7) * 2) =
        __float2bfloat16(probability);
  }
#pragma unroll
  for (int piece = 0; piece < kLatentPanels; ++piece) {
#pragma unroll
    for (int i = 0; i < 8; ++i) state.output[piece][i] *= shrink[HeadSlot(i)];
  }
  sm90::FenceForAsyncProxy();
  SyncThreads(kAllConsumers, kConsumers);
}

// O' += KV' · P' over 16 · kSteps tokens.
template <int kSteps>
__device__ void Accumulate(uint32_t kv, uint32_t probabilities, State& state) {
  sm90::ProductsBegin();
#pragma unroll
  for (int panel = 0; panel < kLatentPanels; ++panel) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      sm90::ProductBf16N16<OperandA::kTransposed>(
          state.output[panel],
          TileDescriptor<kGroupBytes>(kv + panel * kPanelBytes + k * 2 * kGroupBytes),
          TileDescriptor(probabilities + k * 32), true);
    }
  }
  sm90::ProductsCommit();
  sm90::ProductsWait<0>();
}

// The tokens [begin, end) of a row, from the ring.
template <typename Form>
__device__ void Attend(Range tokens, float scale_log2, const Place& place, Ring<Form>& ring,
                       SharedMemory<Form>& shared, State& state) {
  const uint32_t query = SharedAddress(shared.query);
  const uint32_t probabilities = SharedAddress(shared.probabilities);
  for (int token = tokens.begin; token < tokens.end; ring.Next()) {
    const int count = min(ring.Capacity(), tokens.end - token);
    unsigned char* tile = shared.kv + ring.stage * Ring<Form>::kStageBytes;
    const uint32_t kv = SharedAddress(tile);
    float scores[8];
    BarrierWait(&shared.full[ring.stage], ring.parity);
    Scores(kv, query, scores);
    if (count < kTileTokens) CutTail(tile, count, place, scores);
    Softmax(scores, scale_log2, place, shared.probabilities, shared.warp_values, state);
    if (count > 48) {
      Accumulate<4>(kv, probabilities, state);
    } else if (count > 32) {
      Accumulate<3>(kv, probabilities, state);
    } else if (count > 16) {
      Accumulate<2>(kv, probabilities, state);
    } else {
      Accumulate<1>(kv, probabilities, state);
    }
    BarrierArriveIf(&shared.empty[ring.stage], place.lane == 0);
    token += count;
  }
}

__device__ void FinishSums(const Place& place, float (*warp_values)[kHeads], State& state) {
  ReduceOverRows(state.sum, [](float a, float b) { return a + b; });
  ShareWarpValues(state.sum, place, warp_values);
#pragma unroll
  for (int slot = 0; slot < 4; ++slot) {
    const int head = HeadOfSlot(place, slot);
    state.sum[slot] =
        warp_values[0][head] + warp_values[1][head] + warp_values[2][head] + warp_values[3][head];
  }
}

// --- what becomes of a row's sums: output, or a part to be combined with others

// A row's whole output from one block: [16 heads, 512] by way of shared memory, so that rows are
// written 16 bytes at a time. `staging` is what held the query.
constexpr int kStagedRowBytes = kRank * 2 + 16;  // eight heads meet no bank twice
static_assert(kHeads * kStagedRowBytes <= kPanels * kQueryPanelBytes);

__device__ void WriteWhole(const State& state, const Place& place, unsigned char* staging,
                           __nv_bfloat16* out) {
  float inverse[4];
#pragma unroll
  for (int slot = 0; slot < 4; ++slot) inverse[slot] = 1.0f / state.sum[slot];
  // Lane l has the address of row l % 8 of matrix l / 8: a head, and eight columns of its output.
  const int matrix = place.lane / 8, head = matrix / 2 * 8 + place.lane % 8;
  const int column = place.warp * 16 + matrix % 2 * 8;
  const uint32_t base = SharedAddress(staging) + head * kStagedRowBytes + column * 2;
#pragma unroll
  for (int piece = 0; piece < kLatentPanels; ++piece) {
    const float* o = state.output[piece];
    sm90::StoreTransposed(base + piece * 64 * 2, PackBf16(o[0] * inverse[0], o[1] * inverse[1]),
                          PackBf16(o[2] * inverse[0], o[3] * inverse[1]),
                          PackBf16(o[4] * inverse[2], o[5] * inverse[3]),
                          PackBf16(o[6] * inverse[2], o[7] * inverse[3]));
  }
  SyncThreads(kAllConsumers, kConsumers);
  constexpr int kPieces = kRank * 2 / 16;  // of a head
#pragma unroll
  for (int i = 0; i < kHeads * kPieces / kConsumers; ++i) {
    const int at = place.thread + i * kConsumers;
    reinterpret_cast<uint4*>(out)[at] = *reinterpret_cast<const uint4*>(
        staging + at / kPieces * kStagedRowBytes + at % kPieces * 16);
  }
}

// One block computed all of this share's part of a row that others have parts of.
__device__ void WritePart(const State& state, const Place& place, const CutRow& row,
                          const Partials& partials) {
  const int64_t slot = row.Slot(row.part);
#pragma unroll
  for (int piece = 0; piece < kLatentPanels; ++piece) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = (piece * 64 + place.row() + half * 8) * 4 + place.lane % 4;
      partials.sums[slot * kPositions + position] = state.Quad(piece, half);
    }
  }
  if (place.thread < 4) {
    auto* maxima = reinterpret_cast<float4*>(partials.maxima + slot * kMaximaFloats);
    maxima[place.thread] = state.Largest();
    maxima[4 + place.thread] = state.Sum();
  }
}

// To each block of the cluster its slice.
template <typename Form>
__device__ void SendToPeers(const State& state, const Place& place, int rank,
                            SharedMemory<Form>& shared) {
  constexpr int kCluster = Form::kCluster, kColumns = kRank / kCluster;
  const uint32_t barrier = SharedAddress(&shared.arrived);
  if (place.thread == 0) {
    sm90::BarrierExpectBytes(&shared.arrived, sizeof(shared.received));
  }
  if (place.thread < kCluster * 4) {
    const int peer = place.thread / 4, quad = place.thread % 4;
    const uint32_t peer_barrier = sm90::PeerAddress(barrier, peer);
    sm90::StoreToPeer(sm90::PeerAddress(SharedAddress(&shared.received.largest[rank][quad]), peer),
                      state.Largest(), peer_barrier);
    sm90::StoreToPeer(sm90::PeerAddress(SharedAddress(&shared.received.totals[rank][quad]), peer),
                      state.Sum(), peer_barrier);
  }
#pragma unroll
  for (int piece = 0; piece < kLatentPanels; ++piece) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = piece * 64 + place.row() + half * 8;
      const int peer = column / kColumns, position = column % kColumns * 4 + place.lane % 4;
      sm90::StoreToPeer(
          sm90::PeerAddress(SharedAddress(&shared.received.sums[rank][position]), peer),
          state.Quad(piece, half), sm90::PeerAddress(barrier, peer));
    }
  }
}

__device__ float4 Divide(float4 a, float4 b) {
  return make_float4(a.x / b.x, a.y / b.y, a.z / b.z, a.w / b.w);
}

// This block's slice of what the cluster computed.
template <int kCluster>
__device__ void WriteReceived(const Received<kCluster>& received, const Place& place, int rank,
                              const CutRow& row, const Partials& partials, __nv_bfloat16* out) {
  constexpr int kSlice = kPositions / kCluster;
  const int quad = place.thread % 4;
  float4 largest = received.largest[0][quad];
#pragma unroll
  for (int peer = 1; peer < kCluster; ++peer) {
    const float4 other = received.largest[peer][quad];
    largest = make_float4(fmaxf(largest.x, other.x), fmaxf(largest.y, other.y),
                          fmaxf(largest.z, other.z), fmaxf(largest.w, other.w));
  }
  float4 weights[kCluster];
  float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
  for (int peer = 0; peer < kCluster; ++peer) {
    const float4 other = received.largest[peer][quad];
    weights[peer] = make_float4(exp2f(other.x - largest.x), exp2f(other.y - largest.y),
                                exp2f(other.z - largest.z), exp2f(other.w - largest.w));
    AddScaled(weights[peer], received.totals[peer][quad], total);
  }
  const int64_t slot = row.Slot(row.part);
#pragma unroll 1
  for (int i = place.thread; i < kSlice; i += kConsumers) {
    float4 result = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int peer = 0; peer < kCluster; ++peer) {
      AddScaled(weights[peer], received.sums[peer][i], result);
    }
    const int position = rank * kSlice + i;
    if (row.num_parts == 1) {
      StoreHeads(Divide(result, total), position, out);
    } else {
      partials.sums[slot * kPositions + position] = result;
    }
  }
  if (row.num_parts > 1 && place.thread < 4) {
    auto* maxima =
        reinterpret_cast<float4*>(partials.maxima + (slot * kCluster + rank) * kMaximaFloats);
    maxima[place.thread] = largest;
    maxima[4 + place.thread] = total;
  }
}

// --- the kernel

template <typename Form>
__device__ void AttendAll(const Arguments& arguments, const Share& share, int rank,
                          const Place& place, SharedMemory<Form>& shared) {
  constexpr int kCluster = Form::kCluster;
  const MlaDecodeSm90::Layer& layer = arguments.layer;
  const Partials& partials = arguments.partials;
  const int my_share = blockIdx.x / kCluster;
  CutRow pending[2];
  int num_pending = 0;
  Ring<Form> ring;
  for (int row = share.first_row; row <= share.last_row; ++row) {
    const Item item = ItemOf(arguments.plan, share, row);
    const CutRow cut = {item.token, my_share - item.part, item.num_parts, item.part};
    __nv_bfloat16* out = layer.out + int64_t{item.token} * kHeads * kRank;
    LoadQuery(layer, item.token, place, shared.query);
    State state = {};
#pragma unroll
    for (float& largest : state.largest) largest = -INFINITY;
    Attend(TokensOf<kCluster>(item, rank), arguments.scale_log2, place, ring, shared, state);
    FinishSums(place, shared.warp_values, state);
    if constexpr (kCluster == 1) {
      cut.num_parts == 1 ? WriteWhole(state, place, shared.query, out)
                         : WritePart(state, place, cut, partials);
    } else {
      const int round = row - share.first_row;
      if (round == 0) {
        sm90::ClusterWait();
      } else {
        sm90::BarrierWaitForPeers(&shared.peers_done, (round - 1) & 1);
      }
      SendToPeers(state, place, rank, shared);
      sm90::BarrierWaitForPeers(&shared.arrived, round & 1);
      WriteReceived(shared.received, place, rank, cut, partials, out);
    }
    SyncThreads(kAllConsumers, kConsumers);
    if (kCluster > 1 && row < share.last_row && place.thread < kCluster) {
      sm90::ArriveAtPeer(sm90::PeerAddress(SharedAddress(&shared.peers_done), place.thread));
    }
    if (cut.num_parts > 1) {
      if (place.thread == 0) Announce(&partials.arrivals[cut.first_share * kCluster + rank]);
      pending[num_pending++] = cut;
    }
  }

  // A share's first and last row are combined side by side, by half of the threads each.
  if (num_pending == 0) return;
  const int half = num_pending == 2 ? place.thread / (kConsumers / 2) : 0;
  const Team team = {place.thread % (kConsumers / num_pending), kConsumers / num_pending, 2 + half};
  const CutRow& row = pending[half];
  Combine<kCluster>(row, rank, partials, team, reinterpret_cast<CombineScratch*>(shared.kv)[half],
                    layer.out + int64_t{row.token} * kHeads * kRank);
}

template <typename Form>
__global__ __launch_bounds__(Form::kThreads,
                             1) void DecodeKernel(const __grid_constant__ CUtensorMap map,
                                                  const Arguments arguments) {
  constexpr int kCluster = Form::kCluster;
  extern __shared__ unsigned char dynamic_shared[];
  auto& shared = sm90::AtFirstTile<SharedMemory<Form>>(dynamic_shared);
  const Place place = {static_cast<int>(threadIdx.x), static_cast<int>(threadIdx.x) / 32,
                       static_cast<int>(threadIdx.x) % 32};
  const int rank = kCluster == 1 ? 0 : sm90::ClusterRank();
  if (place.thread == kConsumers) {
    if (!Form::kConverts) sm90::PrefetchMap(&map);
    for (int i = 0; i < Form::kStages; ++i) {
      sm90::BarrierInit(&shared.full[i], Form::kConverts ? kConverters / 32 : 1);
      sm90::BarrierInit(&shared.empty[i], kConsumers / 32);
    }
    if constexpr (Form::kConverts) {
      for (int i = 0; i < kStoredGroups; ++i) {
        sm90::BarrierInit(&shared.stored.full[i], 1);
        sm90::BarrierInit(&shared.stored.empty[i], kConverters / 32);
      }
    }
    sm90::BarrierInit(&shared.arrived, 1);
    sm90::BarrierInit(&shared.peers_done, kCluster);
    sm90::BarrierInitFence();
  }
  const bool early = arguments.layer.start == MlaDecodeSm90::Start::kEarly;
  if (!early) sm90::WaitForPredecessors();
  const Share share = arguments.plan.shares[blockIdx.x / kCluster];
  __syncthreads();
  if constexpr (kCluster > 1) sm90::ClusterArrive();
  if (place.thread >= kConsumers) {
    if constexpr (Form::kConverts) sm90::GiveRegisters<80>();
    if (place.warp == Form::kCopyWarp) {
      CopyTiles<Form>(map, arguments, share, rank, place.lane, shared);
    } else if constexpr (Form::kConverts) {
      if (place.thread >= Form::kFirstConverter) {
        ConvertTiles<Form>(arguments, share, rank, place.thread - Form::kFirstConverter, shared);
      }
    }
    return;
  }
  if constexpr (Form::kConverts) sm90::TakeRegisters<232>();
  if (early) sm90::WaitForPredecessors();
  sm90::LetDependentsLaunch();
  AttendAll<Form>(arguments, share, rank, place, shared);
}

template <typename Form>
constexpr int kSharedBytes = sizeof(SharedMemory<Form>) + sm90::kTileAlignment;

// --- clusters

// Calls fn with the cluster size as a constant.
template <typename Fn>
auto WithCluster(int cluster, Fn fn) {
  switch (cluster) {
    case 2:
      return fn(std::integral_constant<int, 2>());
    case 4:
      return fn(std::integral_constant<int, 4>());
    case 8:
      return fn(std::integral_constant<int, 8>());
    case 16:
      return fn(std::integral_constant<int, 16>());
    default:
      return fn(std::integral_constant<int, 1>());
  }
}

// The instance of this form, ready to be launched.
template <typename Form>
auto* KernelOf() {
  static_assert(kSharedBytes<Form> <= 227 * 1024);
  static const bool prepared = [] {
    const auto* kernel = reinterpret_cast<const void*>(DecodeKernel<Form>);
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    kSharedBytes<Form>));
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    return true;
  }();
  (void)prepared;
  return DecodeKernel<Form>;
}

// How many clusters of a size run at once, whatever the cache: one block fills a multiprocessor.
// The kernel's blocks wait for each other.
template <int kCluster>
int ResidentClusters(int num_multiprocessors) {
  using Form = FormOf<kCluster, MlaCacheType::kBf16>;
  if constexpr (kCluster == 1) {
    return num_multiprocessors;
  } else {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {kCluster, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(num_multiprocessors / kCluster * kCluster);
    config.blockDim = dim3(Form::kThreads);
    config.dynamicSmemBytes = kSharedBytes<Form>;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    CUDA_CHECK(cudaOccupancyMaxActiveClusters(
        &clusters, reinterpret_cast<const void*>(KernelOf<Form>()), &config));
    return std::min(clusters, num_multiprocessors / kCluster);
  }
}

struct Division {
  int cluster;
  int num_clusters;
};

// Clusters as large as leave each row one of its own.
Division DivisionFor(int num_rows, int num_multiprocessors) {
  for (int cluster = kMaxCluster; cluster > 1; cluster /= 2) {
    static std::atomic<int> known[kMaxCluster + 1];  // + 1, 0: not asked yet
    int clusters = known[cluster].load(std::memory_order_relaxed) - 1;
    if (clusters < 0) {
      clusters = WithCluster(
          cluster, [&](auto size) { return ResidentClusters<size>(num_multiprocessors); });
      known[cluster].store(clusters + 1, std::memory_order_relaxed);
    }
    if (clusters >= num_rows) return {cluster, clusters};
  }
  static const int alone = ResidentClusters<1>(num_multiprocessors);
  return {1, alone};
}

// --- the workspace; one counter per block and layer

struct Workspace {
  Plan plan;
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
  result.plan.shares = static_cast<Share*>(take(kMaxShares * sizeof(Share)));
  result.plan.later = static_cast<Item*>(take(MlaDecodeSm90::kMaxRows * sizeof(Item)));
  result.partials.sums = static_cast<float4*>(take(slots * kPositions * sizeof(float4)));
  result.partials.maxima = static_cast<float*>(take(slots * kMaximaFloats * sizeof(float)));
  result.partials.arrivals =
      static_cast<int*>(take(int64_t{num_layers} * num_multiprocessors * sizeof(int)));
  return result;
}

}  // namespace
}  // namespace mla_decode

int64_t MlaDecodeSm90::WorkspaceBytes(int num_layers, int num_multiprocessors) {
  // Addresses do not matter for the size.
  return mla_decode::Divide(nullptr, num_layers, num_multiprocessors).num_bytes;
}

bool MlaDecodeSm90::Supports(const cudaDeviceProp& device) {
  return device.major == 9 && device.minor == 0 &&
         device.multiProcessorCount <= mla_decode::kMaxShares;
}

MlaDecodeSm90::MlaDecodeSm90(void* workspace, int num_layers, int num_multiprocessors)
    : workspace_(workspace), num_layers_(num_layers), num_multiprocessors_(num_multiprocessors) {
  CHECK_LE(num_multiprocessors, mla_decode::kMaxShares);
}

MlaDecodeSm90::CacheMap MlaDecodeSm90::MapCache(const MlaCache& cache) {
  CHECK_EQ(cache.block_size % kBlockSizeUnit, 0);
  CHECK_EQ(reinterpret_cast<uintptr_t>(cache.data) % 16, 0);
  CacheMap map = {.type = cache.type, .block_size = cache.block_size};
  if (cache.type == MlaCacheType::kFp8) {
    map.stored = static_cast<const unsigned char*>(cache.data);
  } else {
    map.tokens = sm90::MapPanels({.data = const_cast<void*>(cache.data),
                                  .type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                  .element_bytes = 2,
                                  .rows = cache.num_blocks * cache.block_size,
                                  .columns = mla_decode::kWidth,
                                  .box_rows = mla_decode::kGroupTokens,
                                  .box_columns = 64});
  }
  return map;
}

void MlaDecodeSm90::Schedule(const Rows& rows, cudaStream_t stream) const {
  CHECK(rows.count >= 1 && rows.count <= kMaxRows);
  const mla_decode::Workspace workspace =
      mla_decode::Divide(workspace_, num_layers_, num_multiprocessors_);
  const auto [cluster, num_clusters] = mla_decode::DivisionFor(rows.count, num_multiprocessors_);
  mla_decode::Schedule(rows, num_clusters, cluster, workspace.plan, workspace.partials.arrivals,
                       num_layers_ * num_multiprocessors_, stream);
}

void MlaDecodeSm90::Run(const CacheMap& cache, const Layer& layer, cudaStream_t stream) const {
  CHECK(layer.index >= 0 && layer.index < num_layers_);
  CHECK(layer.num_rows >= 1 && layer.num_rows <= kMaxRows);
  const mla_decode::Workspace workspace =
      mla_decode::Divide(workspace_, num_layers_, num_multiprocessors_);
  mla_decode::Arguments arguments = {.layer = layer,
                                     .stored = cache.stored,
                                     .block_size = cache.block_size,
                                     .scale_log2 = layer.scale * static_cast<float>(M_LOG2E),
                                     .plan = workspace.plan,
                                     .partials = workspace.partials};
  arguments.partials.arrivals += layer.index * num_multiprocessors_;
  const auto [cluster, num_clusters] =
      mla_decode::DivisionFor(layer.num_rows, num_multiprocessors_);
  const int blocks = cluster * num_clusters;
  const auto launch = [&](auto form) {
    using Form = decltype(form);
    cuda::LaunchDependent(mla_decode::KernelOf<Form>(),
                          {.blocks = dim3(blocks),
                           .threads = dim3(Form::kThreads),
                           .shared_bytes = mla_decode::kSharedBytes<Form>,
                           .cluster = Form::kCluster},
                          stream, cache.tokens, arguments);
    return 0;
  };
  mla_decode::WithCluster(cluster, [&](auto size) {
    return cache.type == MlaCacheType::kFp8
               ? launch(mla_decode::FormOf<size, MlaCacheType::kFp8>{})
               : launch(mla_decode::FormOf<size, MlaCacheType::kBf16>{});
  });
}

}  // namespace fathom
