#include "kernels/cuda/fp8_tile_sm90.h"

#include <algorithm>

#include "base/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/fp8_tile_sm90.cuh"
#include "kernels/cuda/sm90_bf16.cuh"
#include "kernels/cuda/sm90_launch.h"

namespace fathom {
namespace fp8_tile {
namespace {

using sm90::PackBf16;

// 64 weight rows of a tile, as BF16, to out[tile.token …][row …].
template <typename S, int kN>
__device__ void StoreHalf(const float (&total)[kFloats<kN>], const Arguments& arguments,
                          const Tile& tile, int row, const Place& place, unsigned char* staging) {
  const uint32_t base = SharedAddress(staging);
#pragma unroll
  for (int pass = 0; pass < kN; pass += kPassTokens) {
    if (pass >= tile.count) break;
#pragma unroll
    for (int j = pass / 16; j < (pass + kPassTokens < kN ? pass + kPassTokens : kN) / 16; ++j) {
      const float* d = total + 8 * j;
      const int token = 16 * j - pass + place.lane / 16 * 8 + place.lane % 8;
      const int piece = place.warp * 2 + place.lane / 8 % 2;
      sm90::StoreTransposed(base + token * sm90::kSwizzledRowBytes + (piece ^ (token & 7)) * 16,
                            PackBf16(d[0], d[1]), PackBf16(d[2], d[3]), PackBf16(d[4], d[5]),
                            PackBf16(d[6], d[7]));
    }
    SyncThreads(1 + place.group, 128);
    constexpr int kAtOnce = 16;  // tokens
    const int piece = place.thread % 8, first = place.thread / 8;
    const unsigned char* from =
        staging + first * sm90::kSwizzledRowBytes + (piece ^ (first & 7)) * 16;
    __nv_bfloat16* target =
        arguments.out + (tile.token + pass + first) * arguments.out_stride + row + piece * 8;
    const int left = tile.count - pass - first;
#pragma unroll
    for (int t = 0; t < kPassTokens; t += kAtOnce) {
      if (t < left) {
        const auto values = *reinterpret_cast<const uint4*>(from + t * sm90::kSwizzledRowBytes);
        if constexpr (S::kWork == Work::kSorted) {  // far more than the L2 holds
          __stcs(reinterpret_cast<uint4*>(target), values);
        } else {
          *reinterpret_cast<uint4*>(target) = values;
        }
      }
      target += kAtOnce * arguments.out_stride;
    }
    SyncThreads(1 + place.group, 128);
  }
}

// 64 tokens of a tile by kN weight rows from `row`, as BF16, by the copy engine, which leaves out
// what does not exist.
template <typename S, int kN>
__device__ void StoreTokens(const float (&total)[kFloats<kN>], const CUtensorMap& out_map,
                            const Tile& tile, int row, const Place& place, unsigned char* staging) {
  constexpr int kBoxBytes = kHalf * sm90::kSwizzledRowBytes;
  constexpr int kPass = S::kStagingBytes / kBoxBytes * kHalf;  // weight rows at a time
  const int token = place.warp * 16 + place.lane % 16;
  const uint32_t base = SharedAddress(staging) + token * sm90::kSwizzledRowBytes;
#pragma unroll
  for (int pass = 0; pass < kN; pass += kPass) {
    constexpr int kEnd = kN < kPass ? kN : kPass;
    if (place.thread == 0) sm90::WaitForStoresToRead();
    SyncThreads(1 + place.group, 128);
#pragma unroll
    for (int j = 0; j < kEnd / 16; ++j) {
      const float* d = total + 8 * (pass / 16 + j);
      const int piece = j % 4 * 2 + place.lane / 16;
      sm90::StoreMatrices(base + j / 4 * kBoxBytes + (piece ^ (token & 7)) * 16,
                          PackBf16(d[0], d[1]), PackBf16(d[2], d[3]), PackBf16(d[4], d[5]),
                          PackBf16(d[6], d[7]));
    }
    sm90::FenceForAsyncProxy();
    SyncThreads(1 + place.group, 128);
    if (place.thread == 0 && tile.count > 0) {
#pragma unroll
      for (int h = 0; h < kEnd / kHalf; ++h) {
        sm90::StoreBox(&out_map, row + pass + h * kHalf, tile.token + place.group * kHalf,
                       staging + h * kBoxBytes);
      }
      sm90::CommitStores();
    }
  }
}

template <typename S, int kN, int kHalves>
__device__ void ComputeTile(const Arguments& arguments, const CUtensorMap* out_map,
                            const Tile& tile, const Place& place, Ring<S::kStages>& ring,
                            SharedMemory<S>& shared) {
  float total[kHalves][kFloats<kN>];
  MultiplyTile<S, kN, kHalves>({0, arguments.k_blocks}, place, ring, shared, total);
  if constexpr (S::kTokensFirst) {
#pragma unroll
    for (int b = 0; b < kHalves; ++b) {
      StoreTokens<S, kN>(total[b], *out_map, tile, tile.row + b * kBlock, place,
                         shared.out[place.group]);
    }
  } else {
#pragma unroll
    for (int b = 0; b < kHalves; ++b) {
      const int row = tile.row + (place.group * kHalves + b) * kHalf;
      if (row < arguments.outputs) {
        StoreHalf<S, kN>(total[b], arguments, tile, row, place, shared.out[place.group]);
      }
    }
  }
}

// --- kernels

extern __shared__ unsigned char dynamic_shared[];

template <typename S>
__device__ void Prepare(const CUtensorMap& weight_map, const CUtensorMap& x_map,
                        SharedMemory<S>& shared) {
  if (threadIdx.x == kConsumers) {
    sm90::PrefetchMap(&weight_map);
    sm90::PrefetchMap(&x_map);
    for (int i = 0; i < S::kStages; ++i) {
      // The copies' announcement, the lanes that bring factors, the threads that gather.
      sm90::BarrierInit(&shared.full[i], 1 + 32 + S::kGatherThreads);
      sm90::BarrierInit(&shared.empty[i], kConsumers / 32 * S::kPair);
    }
    if constexpr (S::kIsQueued) {
      for (int i = 0; i < TileQueue::kTiles; ++i) {
        sm90::BarrierInit(&shared.queue.full[i], 1);
        sm90::BarrierInit(&shared.queue.empty[i], Tiles<S>::kTakers);
      }
    }
    sm90::BarrierInitFence();
  }
  sm90::LetDependentsLaunch();
  if constexpr (S::kPair > 1) {
    sm90::ClusterSync();
  } else {
    __syncthreads();
  }
}

__device__ Place PlaceOfThread() {
  const int thread = threadIdx.x % 128;
  int lane = thread % 32;
  asm volatile("" : "+r"(lane));  // otherwise it is worked out again and again
  // The warp's number from one lane, so that the compiler knows it to be the same for all.
  return {__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0), thread,
          __shfl_sync(~0u, thread / 32, 0), lane};
}

// What a block does; out_map only where the copy engine stores.
template <typename S>
__device__ void RunTiles(const CUtensorMap& weight_map, const CUtensorMap& x_map,
                         const CUtensorMap* out_map, const Arguments& arguments) {
  auto& shared = sm90::AtFirstTile<SharedMemory<S>>(dynamic_shared);
  Prepare(weight_map, x_map, shared);
  if constexpr (S::kIsQueued) {
    sm90::WaitForPredecessors();
    if constexpr (S::kIsDealt) {
      SortChunks(arguments, shared);
    } else {
      LoadChunks(arguments, shared);
    }
  }
  const Place place = PlaceOfThread();
  const Span span = {0, arguments.k_blocks};
  Ring<S::kStages> ring;
  Tile tile;
  if (place.group < 2) {
    sm90::TakeRegisters<216>();
    sm90::WaitForPredecessors();
    Tiles<S> tiles(arguments, shared);
    while (tiles.Next(tile)) {
      const auto compute = [&]<int kN>() {
        if (S::kRowBlocks == 2 && tile.narrow) {
          ComputeTile<S, kN, 1>(arguments, out_map, tile, place, ring, shared);
        } else {
          ComputeTile<S, kN, S::kRowBlocks>(arguments, out_map, tile, place, ring, shared);
        }
      };
      if constexpr (S::kWork == Work::kDense && S::kRowBlocks == 2) {
        compute.template operator()<kBlock>();
      } else if constexpr (S::kWork == Work::kDense) {
        tile.narrow ? compute.template operator()<kHalf>() : compute.template operator()<kBlock>();
      } else if (tile.count <= 32) {
        compute.template operator()<32>();
      } else if (tile.count <= 48) {
        compute.template operator()<48>();
      } else if (tile.count <= 64) {
        compute.template operator()<64>();
      } else if (tile.count <= 80) {
        compute.template operator()<80>();
      } else if (tile.count <= 96) {
        compute.template operator()<96>();
      } else if (tile.count <= 112) {
        compute.template operator()<112>();
      } else {
        compute.template operator()<128>();
      }
    }
    if (S::kTokensFirst && place.thread == 0) sm90::WaitForStores();
  } else {
    sm90::GiveRegisters<72>();
    if (place.warp == 0) {
      if (place.lane == 0) {
        const uint64_t policy =
            S::kWork == Work::kDense ? sm90::EvictNormalPolicy() : sm90::EvictFirstPolicy();
        int ahead = 0;
        if constexpr (S::kWork == Work::kDense) {
          if (DenseTiles<S>(arguments, shared).Next(tile)) {
            ahead = CopyFirstWeights(weight_map, arguments, tile, span, policy, shared);
          }
        }
        sm90::WaitForPredecessors();
        TileSource<S> tiles(arguments, shared);
        for (; tiles.Next(tile); ahead = 0) {
          CopyTile(weight_map, x_map, arguments, tile, span, ahead, policy, ring, shared);
        }
      }
    } else if (place.warp == 1) {
      sm90::WaitForPredecessors();
      if constexpr (S::kWork == Work::kSorted) {
        MultiplySortedFactors(arguments, span, place.lane, ring, shared);
      } else {
        Tiles<S> tiles(arguments, shared);
        while (tiles.Next(tile)) MultiplyFactors(arguments, tile, span, place.lane, ring, shared);
      }
    } else if constexpr (S::kWork == Work::kGathered) {
      sm90::WaitForPredecessors();
      Tiles<S> tiles(arguments, shared);
      for (int buffer = 0; tiles.Next(tile); buffer ^= 1) {
        GatherTile(arguments, tile, span, place.thread - 64, buffer, ring, shared);
      }
    }
  }
  if constexpr (S::kPair > 1) {  // the other block may still copy into this one's memory
    __syncwarp();
    sm90::ClusterSync();
  }
}

template <typename S>
__global__ __launch_bounds__(S::kThreads,
                             1) void DenseKernel(const __grid_constant__ CUtensorMap weight_map,
                                                 const __grid_constant__ CUtensorMap x_map,
                                                 const __grid_constant__ CUtensorMap out_map,
                                                 const Arguments arguments) {
  RunTiles<S>(weight_map, x_map, &out_map, arguments);
}

template <typename S>
__global__ __launch_bounds__(S::kThreads,
                             1) void GroupedKernel(const __grid_constant__ CUtensorMap weight_map,
                                                   const __grid_constant__ CUtensorMap x_map,
                                                   const Arguments arguments) {
  RunTiles<S>(weight_map, x_map, nullptr, arguments);
}

// Totals of a tile by token, a row of 128 a little longer so that no two lanes share a bank.
constexpr int kTotalsStride = kBlock + 4;

template <typename S>
__device__ void WriteTotals(const float (&total)[kFloats<S::kTokens>], const Place& place,
                            float* totals) {
  const int first = place.group * kHalf + place.warp * 16 + place.lane / 4;
  const int second = place.lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kFloats<S::kTokens>; i += 2) {
    const int at_first = first + i / 2 % 2 * 8, at_second = second + i / 4 * 8;
    if constexpr (S::kTokensFirst) {
      *reinterpret_cast<float2*>(&totals[at_first * kTotalsStride + at_second]) =
          make_float2(total[i], total[i + 1]);
    } else {
      totals[at_second * kTotalsStride + at_first] = total[i];
      totals[(at_second + 1) * kTotalsStride + at_first] = total[i + 1];
    }
  }
}

// The blocks of a cluster share a tile's inputs; then each adds up and stores some of its tokens.
template <typename S, int kBlocksAtOnce>
__global__ __launch_bounds__(S::kThreads, kBlocksAtOnce) void SplitKernel(
    const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap x_map,
    const Arguments arguments) {
  static_assert(sizeof(SharedMemory<S>::weight) + sizeof(SharedMemory<S>::x) >=
                S::kTokens * kTotalsStride * sizeof(float));
  auto& shared = sm90::AtFirstTile<SharedMemory<S>>(dynamic_shared);
  Prepare(weight_map, x_map, shared);
  const Place place = PlaceOfThread();
  const int splits = arguments.splits, rank = blockIdx.x % splits;
  const int token_tiles = (arguments.x_rows + S::kTokens - 1) / S::kTokens;
  const int index = blockIdx.x / splits;
  const int token = index % token_tiles * S::kTokens;
  const Tile tile = {0, index / token_tiles * S::kRows, token,
                     min(S::kTokens, arguments.x_rows - token), false};
  const Span span = {arguments.k_blocks * rank / splits, arguments.k_blocks * (rank + 1) / splits};
  auto* totals = reinterpret_cast<float*>(&shared);
  Ring<S::kStages> ring;
  if (place.group < 2) {
    if constexpr (S::kMovesRegisters) sm90::TakeRegisters<216>();
    float total[1][kFloats<S::kTokens>];
    MultiplyTile<S, S::kTokens, 1>(span, place, ring, shared, total);
    SyncThreads(1, kConsumers);  // nobody needs the stages any more
    WriteTotals<S>(total[0], place, totals);
  } else {
    if constexpr (S::kMovesRegisters) sm90::GiveRegisters<72>();
    if (place.warp == 0 && place.lane == 0) {
      const uint64_t policy = sm90::EvictFirstPolicy();
      const int ahead = CopyFirstWeights(weight_map, arguments, tile, span, policy, shared);
      sm90::WaitForPredecessors();
      CopyTile(weight_map, x_map, arguments, tile, span, ahead, policy, ring, shared);
    } else if (place.warp == 1) {
      sm90::WaitForPredecessors();
      MultiplyFactors(arguments, tile, span, place.lane, ring, shared);
    }
  }
  __syncwarp();
  sm90::ClusterSync();
  const int row = tile.row + place.lane * 4;
  if (place.group < 2 && row < arguments.outputs) {
    const int begin = tile.count * rank / splits, end = tile.count * (rank + 1) / splits;
    for (int t = begin + place.group * 4 + place.warp; t < end; t += kConsumers / 32) {
      const uint32_t at = SharedAddress(totals + t * kTotalsStride + place.lane * 4);
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
      for (int r = 0; r < splits; ++r) {
        const float4 part = sm90::LoadFromPeer(sm90::PeerAddress(at, r));
        sum.x += part.x;
        sum.y += part.y;
        sum.z += part.z;
        sum.w += part.w;
      }
      *reinterpret_cast<uint2*>(arguments.out + (tile.token + t) * arguments.out_stride + row) =
          make_uint2(PackBf16(sum.x, sum.y), PackBf16(sum.z, sum.w));
    }
  }
  sm90::ClusterSync();  // others may still read this block's totals
}

// --- the host's side

using Dense = Shape<Work::kDense, 1, 128, 5>;
using WideDense = Shape<Work::kDense, 2, 128, 4>;
using Sorted = Shape<Work::kSorted, 1, 128, 6>;
using Gathered = Shape<Work::kGathered, 2, 128, 4>;
using Split32 = Shape<Work::kSplit, 1, 32, 4>;
using Split64 = Shape<Work::kSplit, 1, 64, 5>;
using Split128 = Shape<Work::kSplit, 1, 128, 6>;

template <typename S>
constexpr int kSharedBytes = sizeof(SharedMemory<S>) + sm90::kTileAlignment;

template <typename S, typename Kernel>
void AllowShared(Kernel* kernel) {
  static_assert(kSharedBytes<S> <= 227 * 1024);
  CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<S>));
}

// How many clusters of each size run at once.
template <typename S, typename Kernel>
void CountClusters(Kernel* kernel, int (&clusters)[9]) {
  AllowShared<S>(kernel);
  for (int splits = 1; splits <= 8; ++splits) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(splits), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(splits);
    config.blockDim = dim3(S::kThreads);
    config.dynamicSmemBytes = kSharedBytes<S>;
    config.attrs = &attribute;
    config.numAttrs = 1;
    CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters[splits], kernel, &config));
  }
}

CUtensorMap MapWeight(const Fp8TileSm90::Weight& weight, int box_rows) {
  return sm90::MapMatrix({.data = const_cast<__nv_fp8_e4m3*>(weight.values),
                          .rows = int64_t{weight.experts} * weight.outputs,
                          .columns = weight.inputs,
                          .box_rows = box_rows,
                          .box_columns = kBlock});
}

CUtensorMap MapInput(const Fp8TileSm90::Input& x, int inputs, int box_rows) {
  return sm90::MapMatrix({.data = const_cast<__nv_fp8_e4m3*>(x.values),
                          .rows = x.rows,
                          .columns = inputs,
                          .row_stride = x.values_stride,
                          .box_rows = box_rows,
                          .box_columns = kBlock});
}

Arguments ArgumentsOf(const Fp8TileSm90::Input& x, const Fp8TileSm90::Weight& weight,
                      const Fp8TileSm90::Output& out) {
  CHECK(Fp8TileSm90::Supports(weight.outputs, weight.inputs));
  CHECK(x.rows * x.scales_stride < int64_t{1} << 31);
  return {.x_scales = x.scales,
          .x_scales_stride = static_cast<int>(x.scales_stride),
          .x = reinterpret_cast<const unsigned char*>(x.values),
          .x_stride = x.values_stride,
          .x_rows = x.rows,
          .factors = weight.factors,
          .outputs = weight.outputs,
          .k_blocks = weight.inputs / kBlock,
          .out = out.values,
          .out_stride = out.stride};
}

CUtensorMap MapOutput(const Fp8TileSm90::Output& out, int rows, int outputs) {
  return sm90::MapMatrix({.data = out.values,
                          .type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                          .element_bytes = 2,
                          .rows = rows,
                          .columns = outputs,
                          .row_stride = out.stride,
                          .box_rows = kHalf,
                          .box_columns = kHalf});
}

template <typename S, typename Kernel, typename... Arguments>
void Launch(Kernel* kernel, int blocks, int cluster, cudaStream_t stream,
            const Arguments&... arguments) {
  cuda::LaunchDependent(kernel, {dim3(blocks), dim3(S::kThreads), kSharedBytes<S>, cluster}, stream,
                        arguments...);
}

// How many blocks should share a tile's inputs: the fewest rounds of the fewest steps.
int ChooseSplits(int tiles, int k_blocks, const int (&clusters)[9]) {
  int best = 1;
  double best_cost = 0;
  for (int splits = 1; splits <= std::min(8, k_blocks); ++splits) {
    if (clusters[splits] == 0) continue;
    const int rounds = (tiles + clusters[splits] - 1) / clusters[splits];
    const int steps = (k_blocks + splits - 1) / splits;
    const double cost = rounds * (steps + 4.0) + 0.25 * splits;
    if (splits == 1 || cost < best_cost) {
      best = splits;
      best_cost = cost;
    }
  }
  return best;
}

}  // namespace
}  // namespace fp8_tile

using fp8_tile::Dense;
using fp8_tile::DenseKernel;
using fp8_tile::Gathered;
using fp8_tile::GroupedKernel;
using fp8_tile::kBlock;
using fp8_tile::kHalf;
using fp8_tile::MapInput;
using fp8_tile::MapWeight;
using fp8_tile::Sorted;
using fp8_tile::Split128;
using fp8_tile::Split32;
using fp8_tile::Split64;
using fp8_tile::SplitKernel;
using fp8_tile::WideDense;

bool Fp8TileSm90::Supports(const cudaDeviceProp& device) {
  return device.major == 9 && device.minor == 0;
}

bool Fp8TileSm90::Supports(int64_t outputs, int64_t inputs) {
  return outputs > 0 && inputs > 0 && outputs % kHalf == 0 && inputs % kBlock == 0;
}

Fp8TileSm90::Fp8TileSm90(int num_multiprocessors) : num_multiprocessors_(num_multiprocessors) {
  dealt_ = static_cast<fp8_tile::Dealt*>(dealt_memory_.Reserve(sizeof(fp8_tile::Dealt)));
  CUDA_CHECK(cudaMemset(dealt_, 0, sizeof(fp8_tile::Dealt)));
  CUDA_CHECK(cudaStreamSynchronize(nullptr));
  fp8_tile::AllowShared<Dense>(DenseKernel<Dense>);
  fp8_tile::AllowShared<WideDense>(DenseKernel<WideDense>);
  fp8_tile::AllowShared<Sorted>(GroupedKernel<Sorted>);
  fp8_tile::AllowShared<Gathered>(GroupedKernel<Gathered>);
  fp8_tile::CountClusters<Split32>(SplitKernel<Split32, 2>, clusters_[0]);
  fp8_tile::CountClusters<Split64>(SplitKernel<Split64, 1>, clusters_[1]);
  fp8_tile::CountClusters<Split128>(SplitKernel<Split128, 1>, clusters_[2]);
}

namespace {

// Outputs [begin, end) of a layer; begin is a multiple of 128.
Fp8TileSm90::Weight RowsOf(const Fp8TileSm90::Weight& weight, int begin, int end) {
  Fp8TileSm90::Weight rows = weight;
  rows.values += int64_t{begin} * weight.inputs;
  rows.factors += int64_t{begin / kBlock} * (weight.inputs / kBlock);
  rows.outputs = end - begin;
  return rows;
}

}  // namespace

void Fp8TileSm90::Linear(const Input& x, const Weight& weight, const Output& out,
                         cudaStream_t stream) const {
  CHECK_EQ(weight.experts, 1);
  if (x.rows == 0) return;
  const int tokens = x.rows <= 32 ? 32 : x.rows <= 64 ? 64 : 128;
  const int token_tiles = (x.rows + tokens - 1) / tokens;
  const int row_tiles = (weight.outputs + kBlock - 1) / kBlock;
  // Pairs that share weights are worth a few idle blocks.
  if (row_tiles * token_tiles < num_multiprocessors_ * 4 / 5 || tokens < kBlock) {
    return LinearOfFewTiles(x, weight, out, tokens, stream);
  }
  if (row_tiles / 2 * token_tiles < num_multiprocessors_ * 3 / 4) {
    return LinearOfManyTiles(x, weight, out, stream);
  }
  const int whole = weight.outputs / kBlock * kBlock;
  LinearOfWideTiles(x, RowsOf(weight, 0, whole), out, stream);
  if (whole == weight.outputs) return;
  // The last 64 weight rows, which would take a wide tile's time, apart.
  const Weight rest = RowsOf(weight, whole, weight.outputs);
  const Output rest_out = {.values = out.values + whole, .stride = out.stride};
  if (token_tiles < num_multiprocessors_) {
    LinearOfFewTiles(x, rest, rest_out, tokens, stream);
  } else {
    LinearOfManyTiles(x, rest, rest_out, stream);
  }
}

void Fp8TileSm90::LinearOfWideTiles(const Input& x, const Weight& weight, const Output& out,
                                    cudaStream_t stream) const {
  fp8_tile::Launch<WideDense>(
      DenseKernel<WideDense>, num_multiprocessors_ / 2 * 2, WideDense::kPair, stream,
      MapWeight(weight, kHalf), MapInput(x, weight.inputs, WideDense::kXBoxRows),
      fp8_tile::MapOutput(out, x.rows, weight.outputs), fp8_tile::ArgumentsOf(x, weight, out));
}

void Fp8TileSm90::LinearOfManyTiles(const Input& x, const Weight& weight, const Output& out,
                                    cudaStream_t stream) const {
  const int tiles = (weight.outputs + kBlock - 1) / kBlock * ((x.rows + kBlock - 1) / kBlock);
  const int blocks = std::min(num_multiprocessors_, (tiles + 1) / 2 * 2) / 2 * 2;
  fp8_tile::Launch<Dense>(DenseKernel<Dense>, blocks, Dense::kPair, stream,
                          MapWeight(weight, kHalf), MapInput(x, weight.inputs, Dense::kXBoxRows),
                          fp8_tile::MapOutput(out, x.rows, weight.outputs),
                          fp8_tile::ArgumentsOf(x, weight, out));
}

void Fp8TileSm90::LinearOfFewTiles(const Input& x, const Weight& weight, const Output& out,
                                   int tokens, cudaStream_t stream) const {
  fp8_tile::Arguments arguments = fp8_tile::ArgumentsOf(x, weight, out);
  const int tiles = (weight.outputs + kBlock - 1) / kBlock * ((x.rows + tokens - 1) / tokens);
  const int variant = tokens == 32 ? 0 : tokens == 64 ? 1 : 2;
  arguments.splits = fp8_tile::ChooseSplits(tiles, arguments.k_blocks, clusters_[variant]);
  const auto launch = [&]<typename S, int kBlocksAtOnce>() {
    fp8_tile::Launch<S>(SplitKernel<S, kBlocksAtOnce>, tiles * arguments.splits, arguments.splits,
                        stream, MapWeight(weight, kBlock), MapInput(x, weight.inputs, S::kXBoxRows),
                        arguments);
  };
  if (variant == 0) {
    launch.template operator()<Split32, 2>();
  } else if (variant == 1) {
    launch.template operator()<Split64, 1>();
  } else {
    launch.template operator()<Split128, 1>();
  }
}

void Fp8TileSm90::GroupedLinear(const Input& x, const Groups& groups, const Weight& weight,
                                const Output& out, cudaStream_t stream) const {
  CHECK(weight.experts == 1 || weight.outputs % kBlock == 0);
  if (x.rows == 0) return;
  fp8_tile::Arguments arguments = fp8_tile::ArgumentsOf(x, weight, out);
  arguments.notes = groups.notes;
  arguments.rows = groups.rows;
  arguments.divisor = groups.divisor;
  arguments.dealt = dealt_;
  if (groups.divisor == 0) {
    fp8_tile::Launch<Sorted>(GroupedKernel<Sorted>,
                             num_multiprocessors_ / Sorted::kPair * Sorted::kPair, Sorted::kPair,
                             stream, MapWeight(weight, kBlock),
                             MapInput(x, weight.inputs, Sorted::kXBoxRows), arguments);
  } else {
    CHECK(x.rows * x.values_stride < int64_t{1} << 32);
    fp8_tile::Launch<Gathered>(GroupedKernel<Gathered>, num_multiprocessors_, 1, stream,
                               MapWeight(weight, kBlock),
                               MapInput(x, weight.inputs, Gathered::kXBoxRows), arguments);
  }
}

}  // namespace fathom
