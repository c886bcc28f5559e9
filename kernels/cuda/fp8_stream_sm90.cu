#include "kernels/cuda/fp8_stream_sm90.h"

#include <cuda_bf16.h>

#include <algorithm>

#include "base/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/fp8_stream_sm90.cuh"
#include "kernels/cuda/sm90_launch.h"

namespace fathom {
namespace fp8_stream {
namespace {

using sm90::SyncThreads;
using sm90::TileDescriptor;

// --- the warpgroups that compute

// Where this thread's accumulators stand (sm90.cuh).
struct Place {
  int group, row_group, turn;  // warpgroups
  int row_thread;              // among those of the same turn
  int warp, lane;

  __device__ explicit Place(int row_groups)
      : group(threadIdx.x / 128),
        row_group(group % row_groups),
        turn(group / row_groups),
        row_thread(threadIdx.x % (row_groups * 128)),
        warp(threadIdx.x / 32 % 4),
        lane(threadIdx.x % 32) {}
  __device__ int row(int i) const { return warp * 16 + lane / 4 + ((i >> 1) & 1) * 8; }
  __device__ int token(int i) const { return 2 * (lane % 4) + (i & 1) + (i >> 2) * 8; }
};

template <int kN, typename Shared>
__device__ void StartProducts(int stage, int tile, const Place& place, const Shared& shared,
                              float (&products)[kN / 2]) {
  const uint32_t weight = SharedAddress(shared.weight[stage]) + place.row_group * kTileBytes;
  const uint32_t x = SharedAddress(shared.x[tile]);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    sm90::ProductFp8<kN>(products, TileDescriptor(weight + step * 32),
                         TileDescriptor(x + step * 32), step != 0);
  }
}

// What the products of this thread's tokens are worth.
template <int kN>
struct Factors {
  float values[kN / 4];

  template <typename Shared>
  __device__ void Load(int tile, float weight, const Place& place, const Shared& shared) {
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const float2 x = *reinterpret_cast<const float2*>(&shared.x_scales[tile][place.token(4 * j)]);
      values[2 * j] = x.x * weight;
      values[2 * j + 1] = x.y * weight;
    }
  }
  __device__ void Add(const float (&products)[kN / 2], float (&sums)[kN / 2]) const {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) sums[i] += products[i] * values[i / 4 * 2 + i % 2];
  }
};

// sums += `count` stages of this warpgroup, a batch at a time; what a last batch lacks is its first
// stage again, counting nothing. Activations that the kernel makes are tiles from `tile` on.
template <typename Form, typename Shared>
__device__ void Multiply(int count, int tile, const Place& place, Ring<Form::kStages>& ring,
                         Shared& shared, float (&sums)[Form::kTokens / 2]) {
  constexpr int kBatch = Form::kBatch;
#pragma unroll 1
  for (; count > 0; count -= kBatch, tile += kBatch) {
    int stages[kBatch], tiles[kBatch];
    float products[kBatch][Form::kTokens / 2];
    Factors<Form::kTokens> factors[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      stages[i] = i < count ? ring.stage : stages[0];
      tiles[i] = !Form::kMakesInput ? stages[i] : i < count ? tile + i : tile;
      if (i < count) {
        BarrierWait(&shared.full[ring.stage], ring.parity);
        ring.Next(Form::kTurns);
      }
    }
    sm90::FenceForAsyncProxy();
    sm90::ProductsBegin();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      StartProducts<Form::kTokens>(stages[i], tiles[i], place, shared, products[i]);
    }
    sm90::ProductsCommit();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float weight_scale = i < count ? shared.weight_scales[stages[i]] : 0.0f;
      factors[i].Load(tiles[i], weight_scale, place, shared);
    }
    sm90::ProductsWait<0>();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      sm90::BarrierArriveIf(&shared.empty[stages[i]], place.lane == 0 && i < count);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) factors[i].Add(products[i], sums);
  }
}

// The warpgroups of the same rows add up in the first of them. Returns whether this is it.
template <typename Form, typename Shared>
__device__ bool AddTurns(const Place& place, float (&sums)[Form::kTokens / 2], Shared& shared) {
  if constexpr (Form::kTurns > 1) {
    if (place.turn > 0) {
#pragma unroll
      for (int j = 0; j < Form::kTokens / 8; ++j) {
        shared.sums[place.turn - 1][j][place.row_thread] =
            make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
      }
    }
    SyncThreads(3, Form::kConsumers);
    if (place.turn == 0) {
#pragma unroll
      for (int turn = 1; turn < Form::kTurns; ++turn) {
#pragma unroll
        for (int j = 0; j < Form::kTokens / 8; ++j) {
          const float4 more = shared.sums[turn - 1][j][place.row_thread];
          sums[4 * j + 0] += more.x;
          sums[4 * j + 1] += more.y;
          sums[4 * j + 2] += more.z;
          sums[4 * j + 3] += more.w;
        }
      }
    }
    SyncThreads(3, Form::kConsumers);
  }
  return place.turn == 0;
}

// --- sums that several shares have parts of
//
// Only the item that a share begins with can have been begun by another, so one slot per share
// holds what it sends. A slot that nobody wrote yet holds kNothing everywhere; who reads it
// puts that back. Data and signal are the same bytes: no fence, no counter, one trip through the
// L2.

constexpr uint32_t kNothing = ~0u;  // a NaN that no arithmetic produces

template <typename Form>
__device__ float4* SlotOf(const Arguments& arguments, const Place& place, int share) {
  constexpr int kPieces = Form::kTokens / 8 * Form::kRows * 128;
  return reinterpret_cast<float4*>(arguments.partials) + share * kPieces + place.row_thread;
}
__device__ bool IsNothing(float value) { return __float_as_uint(value) == kNothing; }
__device__ float Something(float value) {
  return IsNothing(value) ? __uint_as_float(0x7FFFFFFF) : value;
}

__device__ void Store(float4* target, float4 value) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target), "f"(value.x),
               "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}
__device__ float4 Load(const float4* source) {
  float4 value;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "l"(source)
               : "memory");
  return value;
}

template <typename Form>
__device__ void SendPart(const Arguments& arguments, const Place& place,
                         const float (&sums)[Form::kTokens / 2]) {
  float4* slot = SlotOf<Form>(arguments, place, blockIdx.x);
#pragma unroll
  for (int i = 0; i < Form::kTokens / 2; i += 4) {
    Store(slot + i / 4 * Form::kRows * 128,
          make_float4(Something(sums[i]), Something(sums[i + 1]), Something(sums[i + 2]),
                      Something(sums[i + 3])));
  }
}

// Adds the parts of the shares after this one up to `last_share`. They wait for nobody and all of
// the grid is resident, so they come.
template <typename Form>
__device__ void AddParts(const Arguments& arguments, const Place& place, int last_share,
                         float (&sums)[Form::kTokens / 2]) {
  constexpr int kPieces = Form::kTokens / 8, kStep = Form::kRows * 128;
  constexpr int kInFlight = kPieces >= 4 ? 1 : 4 / kPieces;
#pragma unroll 1
  for (int share = blockIdx.x + 1; share <= last_share; share += kInFlight) {
    float4 parts[kInFlight][kPieces];
    bool waiting;
    do {
      waiting = false;
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const float4* slot = SlotOf<Form>(arguments, place, min(share + u, last_share));
#pragma unroll
        for (int i = 0; i < kPieces; ++i) parts[u][i] = Load(slot + i * kStep);
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const float4 part = parts[u][i];
          waiting |=
              IsNothing(part.x) || IsNothing(part.y) || IsNothing(part.z) || IsNothing(part.w);
        }
      }
    } while (waiting);
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (share + u > last_share) break;
      float4* slot = SlotOf<Form>(arguments, place, share + u);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        sums[4 * i + 0] += parts[u][i].x;
        sums[4 * i + 1] += parts[u][i].y;
        sums[4 * i + 2] += parts[u][i].z;
        sums[4 * i + 3] += parts[u][i].w;
        const float nothing = __uint_as_float(kNothing);
        Store(slot + i * kStep, make_float4(nothing, nothing, nothing, nothing));
      }
    }
  }
}

__device__ void Convert(float value, __nv_bfloat16& out) { out = __float2bfloat16(value); }
__device__ void Convert(float value, float& out) { out = value; }

// A warpgroup's [64 rows, tokens] to out[token][row], 16 bytes at a time.
template <typename Form, typename Out, typename Shared>
__device__ void WriteTile(const Arguments& arguments, const Place& place, const ExpertChunk& chunk,
                          int row, const float (&sums)[Form::kTokens / 2], Shared& shared) {
  constexpr int kPiece = 16 / sizeof(Out);
  constexpr int kPiecesPerToken = kTileRows / kPiece;
  const auto sync = [&] { place.row_group == 0 ? SyncThreads(1, 128) : SyncThreads(2, 128); };
  auto& tile = shared.out[place.row_group];
#pragma unroll
  for (int i = 0; i < Form::kTokens / 2; ++i) Convert(sums[i], tile[place.token(i)][place.row(i)]);
  sync();
  const int piece = place.row_thread % kPiecesPerToken * kPiece;
  int token = place.row_thread % 128 / kPiecesPerToken;
  Out* target = static_cast<Out*>(arguments.out) +
                int64_t{chunk.begin + token} * arguments.out_stride + row + piece;
#pragma unroll 1
  for (; token < chunk.count; token += 128 / kPiecesPerToken) {
    // Read soon and once, and as quickly forgotten as the weights: left to the ordinary policy,
    // outputs fill the L2 (w2 at 256 tokens: 33 MB) and the weights' stream is 8% slower.
    __stcs(reinterpret_cast<uint4*>(target), *reinterpret_cast<const uint4*>(&tile[token][piece]));
    target += 128 / kPiecesPerToken * arguments.out_stride;
  }
  sync();
}

// --- activations that the kernel makes itself

// Those of a chunk, all K blocks of them, as Ops::SwiGlu would: silu(gate) * up, rounded, in 1×128.
// Sixteen lanes have the 128 of a token.
template <typename Form, typename Shared>
__device__ void MakeChunk(const Arguments& arguments, const ExpertChunk& chunk, int thread,
                          int first_tile, Shared& shared) {
  constexpr int kAtOnce = Form::kMakers / cuda::kGroupLanes;
  constexpr int kInFlight = 2;
  const int lane = thread % cuda::kGroupLanes;
  const auto token_of = [](int unit) { return unit % Form::kTokens; };
  const auto block_of = [](int unit) { return unit / Form::kTokens; };
#pragma unroll 1
  for (int first = thread / cuda::kGroupLanes; first < Form::kTokens * arguments.k_blocks;
       first += kInFlight * kAtOnce) {
    cuda::PackedEight<__nv_bfloat16> gate[kInFlight], up[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int unit = first + i * kAtOnce;
      const int row = chunk.begin + min(token_of(unit), chunk.count - 1);
      const auto* from = reinterpret_cast<const __nv_bfloat16*>(
          arguments.x + int64_t{row} * arguments.x_row_bytes);
      from += min(block_of(unit), arguments.k_blocks - 1) * kBlock + lane * cuda::kEight;
      gate[i].template Load<true>(from, cuda::kEight);
      up[i].template Load<true>(from + arguments.k_blocks * kBlock, cuda::kEight);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int token = token_of(first + i * kAtOnce), k = block_of(first + i * kAtOnce);
      float x[cuda::kEight];
#pragma unroll
      for (int j = 0; j < cuda::kEight; ++j) {
        const float silu = gate[i][j] / (1.0f + expf(-gate[i][j]));
        x[j] = cuda::RoundedTo<__nv_bfloat16>(silu * up[i][j]);
      }
      const float factor = cuda::FactorOf(cuda::WarpMax<cuda::kGroupLanes>(cuda::LargestOf(x)));
      if (k >= arguments.k_blocks) continue;
      unsigned char* tile = shared.x[first_tile + k] + token * kBlock;
      *reinterpret_cast<uint2*>(tile + (lane / 2 ^ token % 8) * 16 + lane % 2 * 8) =
          cuda::EncodeEight(x, factor);
      if (lane == 0) shared.x_scales[first_tile + k][token] = factor;
    }
  }
}

// The warps that make them, a chunk ahead of those that multiply.
template <typename Form, typename Shared>
__device__ void MakeInputs(const Arguments& arguments, const Work& work, int thread,
                           Shared& shared) {
  Ring<2> ring;
#pragma unroll 1
  for (Cursor cursor(arguments, work.begin, work.end); !cursor.Done(); cursor.Next()) {
    if (!cursor.enters_chunk) continue;
    BarrierWait(&shared.used[ring.stage], ring.parity ^ 1);
    MakeChunk<Form>(arguments, ChunkOf<Form::kTokens>(arguments, cursor.chunk, shared), thread,
                    ring.stage * kMostGatedBlocks, shared);
    sm90::FenceForAsyncProxy();
    sm90::BarrierArriveIf(&shared.made[ring.stage], true);
    ring.Next();
  }
}

// One item of the share; `count` K blocks of it are this warpgroup's. Activations that the kernel
// makes are tiles from `first_tile` on.
template <typename Form, typename Out, typename Shared>
__device__ void ComputeItem(const Arguments& arguments, const Work& work, const Cursor& cursor,
                            const ExpertChunk& chunk, int count, const Place& place, int first_tile,
                            Ring<Form::kStages>& ring, Shared& shared) {
  float sums[Form::kTokens / 2] = {};
  Multiply<Form>(count, first_tile + cursor.first, place, ring, shared, sums);
  if (!AddTurns<Form>(place, sums, shared)) return;
  if (cursor.first > 0) {
    SendPart<Form>(arguments, place, sums);
    return;
  }
  if (cursor.last < cursor.k_blocks) {
    const unsigned last_unit = work.end + cursor.k_blocks - cursor.last - 1;
    AddParts<Form>(arguments, place, work.ShareOf(arguments, last_unit), sums);
  }
  const int row = (cursor.row_block * Form::kRows + place.row_group) * kTileRows;
  if (row < arguments.n) WriteTile<Form, Out>(arguments, place, chunk, row, sums, shared);
}

// Where the chunk at hand has its activations, of those that multiply.
struct MadeInputs {
  Ring<2> next;
  int first_tile = 0;
  bool has_chunk = false;

  template <typename Shared>
  __device__ void NextChunk(const Place& place, Shared& shared) {
    __syncwarp();
    sm90::BarrierArriveIf(&shared.used[next.stage ^ 1], has_chunk && place.lane == 0);
    BarrierWait(&shared.made[next.stage], next.parity);
    first_tile = next.stage * kMostGatedBlocks;
    has_chunk = true;
    next.Next();
  }
};

template <typename Form, typename Out, typename Shared>
__device__ void Compute(const Arguments& arguments, const Work& work, Shared& shared) {
  const Place place(Form::kRows);
  Ring<Form::kStages> ring;
  ring.Next(place.turn);
  int skip = place.turn;  // units of the share until this warpgroup's next one
  ExpertChunk chunk;
  MadeInputs inputs;
#pragma unroll 1
  for (Cursor cursor(arguments, work.begin, work.end); !cursor.Done(); cursor.Next()) {
    if (cursor.enters_chunk) {
      chunk = ChunkOf<Form::kTokens>(arguments, cursor.chunk, shared);
      if constexpr (Form::kMakesInput) inputs.NextChunk(place, shared);
    }
    const int units = cursor.last - cursor.first;
    const int count = (units - skip + Form::kTurns - 1) / Form::kTurns;
    skip += count * Form::kTurns - units;
    ComputeItem<Form, Out>(arguments, work, cursor, chunk, count, place, inputs.first_tile, ring,
                           shared);
  }
}

// --- the kernel

template <typename Form, typename Out>
__global__ __launch_bounds__(Form::kThreads,
                             1) void StreamKernel(const __grid_constant__ CUtensorMap weight_map,
                                                  const __grid_constant__ Arguments arguments) {
  using Shared = SharedMemory<Form, Out>;
  extern __shared__ unsigned char dynamic_shared[];
  Shared& shared = sm90::AtFirstTile<Shared>(dynamic_shared);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == Form::kWeightWarp * 32) {
    sm90::PrefetchMap(&weight_map);
#pragma unroll 1
    for (int i = 0; i < Form::kStages; ++i) {
      sm90::BarrierInit(&shared.full[i], Form::kFullArrivals);
      sm90::BarrierInit(&shared.empty[i], Form::kRows * 4);
    }
    for (int i = 0; i < 2; ++i) {
      sm90::BarrierInit(&shared.made[i], Form::kMakers);
      sm90::BarrierInit(&shared.used[i], Form::kConsumers / 32);
    }
    sm90::BarrierInitFence();
  }
  // What to copy of one matrix is known before the predecessors end.
  if (arguments.notes != nullptr && !arguments.complete_early) sm90::WaitForPredecessors();
  sm90::LetDependentsLaunch();
  const Work work(arguments, LoadChunks<Form>(arguments, shared));
  __syncthreads();
  if (blockIdx.x >= work.shares) {
    sm90::WaitForPredecessors();
  } else if (warp == Form::kWeightWarp) {
    if (threadIdx.x % 32 == 0) CopyWeights<Form>(weight_map, arguments, work, shared);
  } else if constexpr (Form::kMakesInput) {
    sm90::WaitForPredecessors();
    if (warp < Form::kTokenWarp) {
      Compute<Form, Out>(arguments, work, shared);
    } else {
      MakeInputs<Form>(arguments, work, threadIdx.x - Form::kConsumers, shared);
    }
    sm90::WaitForCopies();
  } else {
    CopyFirstActivations<Form>(arguments, work, shared);
    if (warp == Form::kTokenWarp) {
      CopyActivations<Form>(arguments, work, shared);
    } else {
      Compute<Form, Out>(arguments, work, shared);
      sm90::WaitForCopies();
    }
  }
}

// The largest divisor of k_blocks up to `most`: how many units shares take or leave together.
int GrainOf(int k_blocks, int most) {
  int grain = std::min(k_blocks, most);
  while (k_blocks % grain != 0) --grain;
  return grain;
}

template <typename Form, typename Out>
void LaunchKernel(const Fp8StreamSm90::Weight& weight, Arguments arguments, int grain, int blocks,
                  cudaStream_t stream) {
  constexpr int kBytes = sizeof(SharedMemory<Form, Out>) + sm90::kTileAlignment;
  static_assert(kBytes <= 227 * 1024);
  const auto kernel = StreamKernel<Form, Out>;
  static const bool sized = [&] {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    return true;
  }();
  (void)sized;
  const CUtensorMap weight_map = sm90::MapMatrix({.data = const_cast<void*>(weight.values),
                                                  .rows = weight.num_matrices * weight.n,
                                                  .columns = weight.k,
                                                  .box_rows = Form::kItemRows,
                                                  .box_columns = kBlock});
  arguments.grain = GrainOf(arguments.k_blocks, grain);
  arguments.pieces_per_item = arguments.k_blocks / arguments.grain;
  arguments.items_per_chunk = (weight.n + Form::kItemRows - 1) / Form::kItemRows;
  arguments.by_items_per_chunk = Quotient(arguments.items_per_chunk);
  const int64_t items = int64_t{arguments.max_chunks} * arguments.items_per_chunk;
  CHECK_LT(items * arguments.k_blocks * (blocks + 1), int64_t{1} << 31);
  sm90::LaunchDependent(kernel, blocks, Form::kThreads, kBytes, stream, weight_map, arguments);
}

// Which form and grain is a matter of measurement (NOTES.md).
constexpr int kFineShares = 4;

template <typename Out>
void LaunchForTokens(int max_count, const Fp8StreamSm90::Weight& weight, const Arguments& arguments,
                     int blocks, cudaStream_t stream) {
  constexpr Reads kCodes = Reads::kCodes;
  // Of one matrix all of a share fits into the ring and is there before the activations come. Then
  // what remains is short if four warpgroups do it and few shares have parts of the same outputs.
  constexpr int kWholeItems = 16;
  const bool dense = arguments.notes == nullptr;
  if (max_count <= 8 && dense) {
    LaunchKernel<FormOf<kCodes, 8, 1, 4, 20>, Out>(weight, arguments, kWholeItems, blocks, stream);
  } else if (dense) {
    LaunchKernel<FormOf<kCodes, 16, 1, 4, 16>, Out>(weight, arguments, kWholeItems, blocks, stream);
  } else if (max_count <= 8 && arguments.k_blocks > kFineShares) {
    LaunchKernel<FormOf<kCodes, 8, 1, 2, 20>, Out>(weight, arguments, kFineShares, blocks, stream);
  } else if (max_count <= 8) {
    LaunchKernel<FormOf<kCodes, 8, 2, 1, 9>, Out>(weight, arguments, kFineShares, blocks, stream);
  } else {
    LaunchKernel<FormOf<kCodes, 16, 2, 1, 9>, Out>(weight, arguments, kFineShares, blocks, stream);
  }
}
template <typename Out>
void LaunchGated(const Fp8StreamSm90::Weight& weight, const Arguments& arguments, int blocks,
                 cudaStream_t stream) {
  LaunchKernel<FormOf<Reads::kGateUp, Fp8StreamSm90::kMaxGatedTokens, 2, 1, 10>, Out>(
      weight, arguments, kFineShares, blocks, stream);
}

void SetSizes(const Fp8StreamSm90::Weight& weight, const Fp8StreamSm90::Output& out, int blocks,
              Arguments& arguments) {
  CHECK(Fp8StreamSm90::Supports(weight));
  arguments.weight_scales = weight.scale_inv;
  arguments.out = out.values;
  arguments.out_stride = out.row_stride;
  arguments.n = weight.n;
  arguments.k_blocks = weight.k / kBlock;
  arguments.scale_rows = (weight.n + kBlock - 1) / kBlock;
  arguments.by_blocks = Quotient(blocks);
  arguments.by_k_blocks = Quotient(arguments.k_blocks);
}
void SetGroups(const Fp8StreamSm90::Groups& groups, Arguments& arguments) {
  CHECK(groups.max_count >= 1 && groups.max_count <= Fp8StreamSm90::kMaxTokens);
  arguments.notes = groups.notes;
  arguments.complete_early = groups.complete_early;
  arguments.rows = groups.rows;
  arguments.by_divisor = Quotient(groups.divisor);
  arguments.num_rows = static_cast<int>(groups.num_rows);
  arguments.max_chunks = static_cast<int>(groups.max_chunks);
}

void Launch(const Fp8StreamSm90::Input& x, const Fp8StreamSm90::Weight& weight,
            const Fp8StreamSm90::Output& out, int max_count, int blocks, Arguments arguments,
            cudaStream_t stream) {
  CHECK_LT(x.rows * x.row_bytes, int64_t{1} << 31);
  SetSizes(weight, out, blocks, arguments);
  arguments.x = static_cast<const unsigned char*>(x.values);
  arguments.x_row_bytes = static_cast<unsigned>(x.row_bytes);
  arguments.x_scales = x.scales;
  if (out.type == Fp8StreamSm90::OutputType::kBf16) {
    LaunchForTokens<__nv_bfloat16>(max_count, weight, arguments, blocks, stream);
  } else {
    LaunchForTokens<float>(max_count, weight, arguments, blocks, stream);
  }
}

}  // namespace
}  // namespace fp8_stream

int64_t Fp8StreamSm90::WorkspaceBytes(int num_multiprocessors) {
  return int64_t{num_multiprocessors} * 2 * fp8_stream::kTileRows * kMaxTokens * sizeof(float);
}

bool Fp8StreamSm90::Supports(const cudaDeviceProp& device) {
  return device.major == 9 && device.minor == 0;
}

bool Fp8StreamSm90::Supports(const Weight& weight) {
  return weight.n % fp8_stream::kTileRows == 0 && weight.k % fp8_stream::kBlock == 0;
}

Fp8StreamSm90::Fp8StreamSm90(void* workspace, int num_multiprocessors)
    : workspace_(workspace), num_multiprocessors_(num_multiprocessors) {
  CUDA_CHECK(cudaMemset(workspace, 0xFF, WorkspaceBytes(num_multiprocessors)));
  CUDA_CHECK(cudaDeviceSynchronize());
}

void Fp8StreamSm90::Linear(const Input& x, const Weight& weight, const Output& out,
                           cudaStream_t stream) const {
  CHECK_EQ(weight.num_matrices, 1);
  if (x.rows == 0) return;
  fp8_stream::Arguments arguments = {};
  arguments.partials = static_cast<float*>(workspace_);
  arguments.num_rows = static_cast<int>(x.rows);
  arguments.max_chunks = (arguments.num_rows + 7) / 8;
  const int max_count = static_cast<int>(std::min<int64_t>(x.rows, kMaxTokens));
  fp8_stream::Launch(x, weight, out, max_count, num_multiprocessors_, arguments, stream);
}

void Fp8StreamSm90::GroupedLinear(const Input& x, const Groups& groups, const Weight& weight,
                                  const Output& out, cudaStream_t stream) const {
  fp8_stream::Arguments arguments = {};
  fp8_stream::SetGroups(groups, arguments);
  if (x.rows == 0) return;
  arguments.partials = static_cast<float*>(workspace_);
  fp8_stream::Launch(x, weight, out, groups.max_count, num_multiprocessors_, arguments, stream);
}

bool Fp8StreamSm90::SupportsGated(const Weight& weight) {
  return Supports(weight) && weight.k <= fp8_stream::kMostGatedBlocks * fp8_stream::kBlock;
}

void Fp8StreamSm90::GroupedGatedLinear(const GateUp& gate_up, const Groups& groups,
                                       const Weight& weight, const Output& out,
                                       cudaStream_t stream) const {
  CHECK(SupportsGated(weight) && groups.rows == nullptr);
  CHECK_LE(groups.max_count, kMaxGatedTokens);
  fp8_stream::Arguments arguments = {};
  fp8_stream::SetGroups(groups, arguments);
  if (groups.num_rows == 0) return;
  fp8_stream::SetSizes(weight, out, num_multiprocessors_, arguments);
  arguments.partials = static_cast<float*>(workspace_);
  arguments.x = static_cast<const unsigned char*>(gate_up.values);
  arguments.x_row_bytes = static_cast<unsigned>(gate_up.row_bytes);
  if (out.type == OutputType::kBf16) {
    fp8_stream::LaunchGated<__nv_bfloat16>(weight, arguments, num_multiprocessors_, stream);
  } else {
    fp8_stream::LaunchGated<float>(weight, arguments, num_multiprocessors_, stream);
  }
}

}  // namespace fathom
