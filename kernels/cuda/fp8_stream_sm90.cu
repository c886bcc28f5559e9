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

// Named barriers: of one warpgroup, of all.
constexpr int kFirstGroup = 1, kAllTurns = 7;

// Where this thread's accumulators stand (sm90.cuh).
struct Place {
  int group, row_group, turn, team;  // warpgroups
  int row_thread;                    // among those of the same turn
  int warp, lane;

  template <typename Form>
  __device__ explicit Place(Form)
      : group(threadIdx.x / 128),
        row_group(group % Form::kRows),
        turn(group / Form::kRows % Form::kTurns),
        team(group / (Form::kRows * Form::kTurns)),
        row_thread(threadIdx.x % (Form::kRows * 128)),
        warp(threadIdx.x / 32 % 4),
        lane(threadIdx.x % 32) {}
  __device__ int row(int i) const { return warp * 16 + lane / 4 + ((i >> 1) & 1) * 8; }
  __device__ int token(int i) const { return 2 * (lane % 4) + (i & 1) + (i >> 2) * 8; }
};

template <int kN, typename Shared>
__device__ void StartProducts(int stage, const Place& place, const Shared& shared,
                              float (&products)[kN / 2]) {
  const uint32_t weight = SharedAddress(shared.weight[stage]) + place.row_group * kTileBytes;
  const uint32_t x = SharedAddress(shared.x[stage]);
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
  __device__ void Load(int stage, float weight, const Place& place, const Shared& shared) {
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const float2 x =
          *reinterpret_cast<const float2*>(&shared.x_scales[stage][place.token(4 * j)]);
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
// stage again, counting nothing.
template <typename Form, typename Shared>
__device__ void Multiply(int count, const Place& place, Ring<Form::kStages>& ring, Shared& shared,
                         float (&sums)[Form::kTokens / 2]) {
  constexpr int kBatch = Form::kBatch;
#pragma unroll 1
  for (; count > 0; count -= kBatch) {
    int stages[kBatch];
    float products[kBatch][Form::kTokens / 2];
    Factors<Form::kTokens> factors[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      stages[i] = i < count ? ring.stage : stages[0];
      if (i < count) {
        BarrierWait(&shared.full[ring.stage], ring.parity);
        ring.Next(Form::kTurns);
      }
    }
    sm90::FenceForAsyncProxy();
    sm90::ProductsBegin();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      StartProducts<Form::kTokens>(stages[i], place, shared, products[i]);
    }
    sm90::ProductsCommit();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float weight_scale = i < count ? shared.weight_scales[stages[i]] : 0.0f;
      factors[i].Load(stages[i], weight_scale, place, shared);
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
    SyncThreads(kAllTurns, Form::kConsumers);
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
    SyncThreads(kAllTurns, Form::kConsumers);
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

// The L2 should keep this share of what is stored, and forget the rest first.
__device__ uint64_t KeepingPolicy(float share) {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.L2::evict_first.b64 %0, %1;"
               : "=l"(policy)
               : "f"(share));
  return policy;
}
__device__ void StoreSixteen(void* to, uint4 value, uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "l"(policy)
               : "memory");
}

// A warpgroup's [64 rows, tokens] to out[token][row], 16 bytes at a time.
template <typename Form, typename Out, typename Shared>
__device__ void WriteTile(const Arguments& arguments, const Place& place, const ExpertChunk& chunk,
                          int row, const float (&sums)[Form::kTokens / 2], Shared& shared) {
  constexpr int kPiece = 16 / sizeof(Out);
  constexpr int kPiecesPerToken = kTileRows / kPiece;
  const int writer = place.team * Form::kRows + place.row_group;
  const auto sync = [&] { SyncThreads(kFirstGroup + writer, 128); };
  auto& tile = shared.out[writer];
#pragma unroll
  for (int i = 0; i < Form::kTokens / 2; ++i) Convert(sums[i], tile[place.token(i)][place.row(i)]);
  sync();
  const int piece = place.row_thread % kPiecesPerToken * kPiece;
  int token = place.row_thread % 128 / kPiecesPerToken;
  Out* target = static_cast<Out*>(arguments.out) +
                int64_t{chunk.begin + token} * arguments.out_stride + row + piece;
#pragma unroll 1
  for (; token < chunk.count; token += 128 / kPiecesPerToken) {
    const uint4 values = *reinterpret_cast<const uint4*>(&tile[token][piece]);
    if constexpr (Form::kKeepsOutput) {
      StoreSixteen(target, values, KeepingPolicy(arguments.kept));
    } else {
      // Read soon and once, and as quickly forgotten as the weights: left to the ordinary policy,
      // outputs fill the L2 (w2 at 256 tokens: 33 MB) and the weights' stream is 8% slower.
      __stcs(reinterpret_cast<uint4*>(target), values);
    }
    target += 128 / kPiecesPerToken * arguments.out_stride;
  }
  sync();
}

// --- activations that the kernel makes itself, of one token

// As Ops::SwiGlu would: silu(gate) * up, rounded, in 1×128; their factor times the token's share of
// the expert. Half a warp makes those of a unit, a row of its stage's tile; what stands in the
// other rows counts for no token that exists.
template <typename Form, typename Shared>
__device__ void MakeInputs(const Arguments& arguments, const Work<Form>& work, Shared& shared) {
  constexpr int kAtOnce = Form::kMakers * 32 / Form::kMakerLanes;  // units
  static_assert(Form::kMakerLanes == cuda::kGroupLanes);
  const int lane = threadIdx.x % Form::kMakerLanes;
  const int half = (threadIdx.x - Form::kConsumers) / Form::kMakerLanes;
#pragma unroll 1
  for (unsigned at = 0; work.begin + at < work.end; at += kAtOnce) {
    const unsigned index = at + half;
    const Cursor cursor(arguments, work, min(work.begin + index, work.end - 1));
    const int chunk = arguments.by_k_blocks(cursor.first);
    const int k = cursor.first - chunk * arguments.k_blocks;
    const int row = ChunkOf<Form::kTokens>(arguments, chunk, shared).begin;
    const int choice = ChoiceOf(arguments, row, shared);
    const auto* from =
        reinterpret_cast<const __nv_bfloat16*>(arguments.x + int64_t{row} * arguments.x_row_bytes);
    from += k * kBlock + lane * cuda::kEight;
    sm90::WaitForPredecessors();
    cuda::PackedEight<__nv_bfloat16> gate, up;
    gate.template Load<true>(from, cuda::kEight);
    up.template Load<true>(from + arguments.k_blocks * kBlock, cuda::kEight);
    const float share = arguments.shares[choice];
    float x[cuda::kEight];
#pragma unroll
    for (int j = 0; j < cuda::kEight; ++j) {
      const float silu = gate[j] / (1.0f + expf(-gate[j]));
      x[j] = cuda::RoundedTo<__nv_bfloat16>(silu * up[j]);
    }
    const float factor = cuda::FactorOf(cuda::WarpMax<cuda::kGroupLanes>(cuda::LargestOf(x)));
    if (work.begin + index < work.end) {
      const int stage = index % Form::kStages;
      BarrierWait(&shared.empty[stage], (index / Form::kStages & 1) ^ 1);
      *reinterpret_cast<uint2*>(shared.x[stage] + lane * cuda::kEight) =
          cuda::EncodeEight(x, factor);
      if (lane == 0) shared.x_scales[stage][0] = factor * share;
      sm90::FenceForAsyncProxy();
      sm90::BarrierArriveIf(&shared.full[stage], true);
    }
    __syncwarp();
  }
}

// No expert is this rank's: the token gets nothing from here.
template <typename Out>
__device__ void WriteZeros(const Arguments& arguments) {
  sm90::WaitForPredecessors();
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < static_cast<unsigned>(arguments.n);
       i += gridDim.x * blockDim.x) {
    Convert(0.0f, static_cast<Out*>(arguments.out)[i]);
  }
}

// --- the warpgroups, item by item

// One item of the share; `count` K blocks of it are this warpgroup's.
template <typename Form, typename Out, typename Shared>
__device__ void ComputeItem(const Arguments& arguments, const Work<Form>& work,
                            const Cursor& cursor, const ExpertChunk& chunk, int count,
                            const Place& place, Ring<Form::kStages>& ring, Shared& shared) {
  float sums[Form::kTokens / 2] = {};
  Multiply<Form>(count, place, ring, shared, sums);
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

template <typename Form, typename Out, typename Shared>
__device__ void Compute(const Arguments& arguments, const Work<Form>& work, Shared& shared) {
  const Place place(Form{});
  Ring<Form::kStages> ring;
  ring.Next(place.turn);
  int skip = place.turn;             // units of the share until this warpgroup's next one
  ExpertChunk chunk = {0, 0, 1, 0};  // the only row that joined matrices have
  int team = 0;                      // whose item it is
#pragma unroll 1
  for (Cursor cursor(arguments, work, work.begin); !cursor.Done(); cursor.Next()) {
    if (!Form::kJoins && cursor.enters_chunk) {
      chunk = ChunkOf<Form::kTokens>(arguments, cursor.chunk, shared);
    }
    const int units = cursor.last - cursor.first;
    if constexpr (Form::kTeams > 1) {
      const bool is_ours = team == place.team;
      team = team + 1 < Form::kTeams ? team + 1 : 0;
      if (!is_ours) {
        ring.Next(units);
        continue;
      }
    }
    const int count = (units - skip + Form::kTurns - 1) / Form::kTurns;
    skip += count * Form::kTurns - units;
    ComputeItem<Form, Out>(arguments, work, cursor, chunk, count, place, ring, shared);
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
    sm90::BarrierInitFence();
  }
  // What to copy of one matrix is known before the predecessors end.
  const bool is_dense = arguments.notes == nullptr;
  if (!is_dense && !arguments.complete_early) sm90::WaitForPredecessors();
  if (!is_dense) sm90::LetDependentsLaunch();
  const Work<Form> work(arguments, LoadChunks<Form>(arguments, shared));
  __syncthreads();
  if (Form::kJoins && work.pieces == 0) {
    WriteZeros<Out>(arguments);
  } else if (blockIdx.x >= work.shares) {
    sm90::WaitForPredecessors();
  } else if (warp == Form::kWeightWarp) {
    if (threadIdx.x % 32 == 0) CopyWeights<Form>(weight_map, arguments, work, shared);
  } else if constexpr (Form::kJoins) {
    if (warp < Form::kTokenWarp) {
      sm90::WaitForPredecessors();
      Compute<Form, Out>(arguments, work, shared);
    } else {
      MakeInputs<Form>(arguments, work, shared);
    }
    sm90::WaitForCopies();
  } else {
    CopyFirstActivations<Form>(arguments, work, shared);
    // Not before: weights that the next kernels read early would hold up this one's.
    if (is_dense) sm90::LetDependentsLaunch();
    if (warp == Form::kTokenWarp) {
      CopyActivations<Form>(arguments, work, shared);
    } else {
      Compute<Form, Out>(arguments, work, shared);
      sm90::WaitForCopies();
    }
  }
}

// Whether each stage of the ring is always the same team's. If it were not, one could look for the
// next use of a stage while its last one still lacks data, and would take this for that.
template <typename Form>
constexpr bool SuitTeams(int k_blocks) {
  return Form::kStages % (Form::kTeams * k_blocks) == 0;
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
  if (Form::kTeams > 1) {  // which take whole items
    CHECK(arguments.pieces_per_item == 1 && SuitTeams<Form>(arguments.k_blocks));
  }
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
  using ShortItems = FormOf<kCodes, 8, 1, 1, 4, 16>;
  const bool dense = arguments.notes == nullptr;
  if (max_count <= 8 && dense) {
    LaunchKernel<FormOf<kCodes, 8, 1, 4, 1, 20>, Out>(weight, arguments, kWholeItems, blocks,
                                                      stream);
  } else if (dense) {
    LaunchKernel<FormOf<kCodes, 16, 1, 4, 1, 16>, Out>(weight, arguments, kWholeItems, blocks,
                                                       stream);
  } else if (max_count <= 8 && SuitTeams<ShortItems>(arguments.k_blocks)) {
    LaunchKernel<ShortItems, Out>(weight, arguments, arguments.k_blocks, blocks, stream);
  } else if (max_count <= 8) {
    LaunchKernel<FormOf<kCodes, 8, 1, 2, 1, 20>, Out>(weight, arguments, kFineShares, blocks,
                                                      stream);
  } else if (arguments.kept == 0.0f) {
    LaunchKernel<FormOf<kCodes, 16, 2, 1, 1, 9>, Out>(weight, arguments, kFineShares, blocks,
                                                      stream);
  } else {
    LaunchKernel<FormOf<kCodes, 16, 2, 1, 1, 9, true>, Out>(weight, arguments, kFineShares, blocks,
                                                            stream);
  }
}
template <typename Out>
void LaunchJoined(const Fp8StreamSm90::Weight& weight, const Arguments& arguments, int blocks,
                  cudaStream_t stream) {
  LaunchKernel<FormOf<Reads::kGateUp, 8, 2, 1, 1, 10>, Out>(weight, arguments, kFineShares, blocks,
                                                            stream);
}

void SetSizes(const Fp8StreamSm90::Weight& weight, const Fp8StreamSm90::Output& out, int blocks,
              Arguments& arguments) {
  CHECK(Fp8StreamSm90::Supports(weight));
  arguments.weight_scales = weight.scale_inv;
  arguments.out = out.values;
  arguments.out_stride = out.row_stride;
  arguments.kept = out.kept;
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

void Fp8StreamSm90::JoinedLinear(const GateUp& gate_up, const Groups& groups, const float* shares,
                                 const Weight& weight, const Output& out,
                                 cudaStream_t stream) const {
  CHECK(groups.rows != nullptr && groups.max_count == 1);
  fp8_stream::Arguments arguments = {};
  fp8_stream::SetGroups(groups, arguments);
  fp8_stream::SetSizes(weight, out, num_multiprocessors_, arguments);
  arguments.partials = static_cast<float*>(workspace_);
  arguments.x = static_cast<const unsigned char*>(gate_up.values);
  arguments.x_row_bytes = static_cast<unsigned>(gate_up.row_bytes);
  arguments.shares = shares;
  if (out.type == OutputType::kBf16) {
    fp8_stream::LaunchJoined<__nv_bfloat16>(weight, arguments, num_multiprocessors_, stream);
  } else {
    fp8_stream::LaunchJoined<float>(weight, arguments, num_multiprocessors_, stream);
  }
}

}  // namespace fathom
