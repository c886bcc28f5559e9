#include "kernels/cuda/fp8_stream_sm90.h"

#include <cuda_bf16.h>

#include <algorithm>

#include "base/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/expert_chunks.h"
#include "kernels/cuda/sm90.cuh"
#include "kernels/cuda/sm90_launch.h"

namespace fathom {
namespace {

using sm90::BarrierWait;
using sm90::SharedAddress;
using sm90::SyncThreads;
using sm90::TileDescriptor;

// Words: an item is 128 rows of one matrix times one chunk of tokens; a unit is one K block (128
// columns) of it, which is also one stage of the ring; a share is the units of one thread block.
//
// With one token a layer takes a few thousand cycles, and instructions that run once cost more to
// fetch than to execute. So loops that run once or twice are not unrolled, and one instance of the
// kernel knows one width of the matrix products.
constexpr int kItemRows = 128;
constexpr int kTileRows = 64;  // a warpgroup's half of an item
constexpr int kBlock = 128;    // columns under one factor; one byte each
constexpr int kUnitBytes = kItemRows * kBlock;
constexpr int kConsumers = 2 * 128;          // two warpgroups compute,
constexpr int kTokenWarp = kConsumers / 32;  // one warp copies activations and their factors,
constexpr int kWeightWarp = kTokenWarp + 1;  // one copies weights and theirs
constexpr int kThreads = kConsumers + 2 * 32;
constexpr int kFullArrivals = 1 + 1 + 32;  // the weights, their factor, each lane's small copies
constexpr int kKnownChunks = 432;          // that are kept in shared memory
constexpr int kKnownRows = 128;

// n / divisor for n < 2³¹.
class Quotient {
 public:
  Quotient() = default;
  explicit Quotient(unsigned divisor) {
    while ((1u << shift_) < divisor) ++shift_;
    shift_ += 31;
    multiplier_ = static_cast<unsigned>(((uint64_t{1} << shift_) + divisor - 1) / divisor);
  }
  __device__ unsigned operator()(unsigned n) const {
    return static_cast<unsigned>((uint64_t{n} * multiplier_) >> shift_);
  }

 private:
  unsigned multiplier_ = 0;
  int shift_ = 0;
};

struct Arguments {
  const unsigned char* x;
  const float* x_scales;
  const float* weight_scales;
  const int* notes;  // null: one matrix
  const int* rows;   // sorted row to row of x, times divisor; null: the same
  void* out;
  float* partials;  // [shares][kTokens / 8][kConsumers][4]
  int64_t out_stride;
  unsigned x_row_bytes;  // all of x is below 2³¹ bytes (CHECKed by the host)
  int num_rows;          // sorted ones, or of one matrix
  int max_chunks;        // that notes have room for
  int n;
  int k_blocks;
  int items_per_chunk;
  int grain;            // units that a share takes or leaves together; divides k_blocks
  int pieces_per_item;  // k_blocks / grain
  Quotient by_divisor, by_blocks, by_k_blocks, by_items_per_chunk;
};

template <int kTokens, int kStages, typename Out>
struct SharedMemory {
  struct alignas(sm90::kTileAlignment) Stage {
    unsigned char weight[kUnitBytes];
    unsigned char x[kTokens * kBlock];
  };
  static constexpr int kPitch = kTileRows + 16 / sizeof(Out);  // bank conflicts
  Stage stages[kStages];
  float x_scales[kStages][kTokens];
  float weight_scales[kStages];
  alignas(16) Out out[2][kTokens][kPitch];
  uint64_t full[kStages];
  uint64_t empty[kStages];
  int4 chunks[kKnownChunks];
  int rows[kKnownRows];
};

// --- small copies that a thread starts and does not wait for

// They are ordinary stores to the tensor cores: who reads them there calls FenceForAsyncProxy.
__device__ void CopyFourBytes(void* target, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(SharedAddress(target)), "l"(source)
               : "memory");
}
__device__ void CopySixteenBytes(void* target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(SharedAddress(target)), "l"(source)
               : "memory");
}
// Arrives once when the small copies that this thread started are complete.
__device__ void ArriveAfterCopies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(SharedAddress(barrier))
               : "memory");
}
__device__ void WaitForCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// --- who does what

// Of P pieces of `grain` units, share i of S owns [P * i / S, P * (i + 1) / S).
struct Work {
  unsigned pieces;  // times shares it stays below 2³¹ (CHECKed by the host)
  unsigned shares;
  unsigned begin, end;  // this block's units

  __device__ Work(const Arguments& arguments, int num_chunks)
      : pieces(num_chunks * arguments.items_per_chunk * arguments.pieces_per_item),
        shares(min(gridDim.x, pieces)),
        begin(Begin(arguments, blockIdx.x)),
        end(Begin(arguments, blockIdx.x + 1)) {}

  __device__ unsigned Begin(const Arguments& arguments, unsigned share) const {
    const unsigned piece = shares < gridDim.x ? share : arguments.by_blocks(pieces * share);
    return piece * arguments.grain;
  }
  __device__ int ShareOf(const Arguments& arguments, unsigned unit) const {
    return ((unit / arguments.grain + 1) * shares - 1) / pieces;
  }
};

// Asks for all that the kernel before wrote about the rows at once. Returns the number of chunks.
template <int kTokens, typename Shared>
__device__ int LoadChunks(const Arguments& arguments, Shared& shared) {
  if (arguments.notes == nullptr) return (arguments.num_rows + kTokens - 1) / kTokens;
  const int4* chunks = reinterpret_cast<const int4*>(arguments.notes + kFirstChunkNote);
#pragma unroll 1
  for (int i = threadIdx.x; i < min(kKnownChunks, arguments.max_chunks); i += kThreads) {
    CopySixteenBytes(&shared.chunks[i], &chunks[i]);
  }
  if (arguments.rows != nullptr && threadIdx.x < min(kKnownRows, arguments.num_rows)) {
    CopyFourBytes(&shared.rows[threadIdx.x], &arguments.rows[threadIdx.x]);
  }
  const int num_chunks = arguments.notes[0];
  WaitForCopies();
  return num_chunks;
}
template <int kTokens, typename Shared>
__device__ ExpertChunk ChunkOf(const Arguments& arguments, int index, const Shared& shared) {
  if (arguments.notes == nullptr) {
    const int begin = index * kTokens;
    return {0, begin, min(kTokens, arguments.num_rows - begin), 0};
  }
  const int4 chunk = index < kKnownChunks
                         ? shared.chunks[index]
                         : reinterpret_cast<const int4*>(arguments.notes + kFirstChunkNote)[index];
  return {chunk.x, chunk.y, chunk.z, 0};
}
// Which row of x a sorted row is.
template <typename Shared>
__device__ unsigned InputRow(const Arguments& arguments, int row, const Shared& shared) {
  if (arguments.rows == nullptr) return row;
  return arguments.by_divisor(row < kKnownRows ? shared.rows[row] : arguments.rows[row]);
}

// Walks units [begin, end) item by item.
struct Cursor {
  int k_blocks, items_per_chunk;
  int units;        // left, this item's included
  int first, last;  // K blocks of the item
  int chunk, row_block;
  bool enters_chunk = true;

  __device__ Cursor(const Arguments& arguments, unsigned begin, unsigned end)
      : k_blocks(arguments.k_blocks), items_per_chunk(arguments.items_per_chunk) {
    const unsigned item = arguments.by_k_blocks(begin);
    units = end - begin;
    first = begin - item * k_blocks;
    last = min(k_blocks, first + units);
    chunk = arguments.by_items_per_chunk(item);
    row_block = item - chunk * items_per_chunk;
  }
  __device__ bool Done() const { return units <= 0; }
  __device__ void Next() {
    units -= last - first;
    first = 0;
    last = min(k_blocks, units);
    enters_chunk = ++row_block == items_per_chunk;
    if (enters_chunk) {
      row_block = 0;
      ++chunk;
    }
  }
};

// Where in the ring.
template <int kStages>
struct Ring {
  int stage = 0;
  int parity = 0;
  __device__ void Next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// --- the warps that copy

// Weights and their factors; one thread.
template <int kTokens, int kStages, typename Shared>
__device__ void CopyWeights(const CUtensorMap& map, const Arguments& arguments, const Work& work,
                            Shared& shared) {
  const uint64_t policy = sm90::EvictFirstPolicy();
  Ring<kStages> ring;
  int expert = 0;
#pragma unroll 1
  for (Cursor cursor(arguments, work.begin, work.end); !cursor.Done(); cursor.Next()) {
    if (cursor.enters_chunk) {
      expert = ChunkOf<kTokens>(arguments, cursor.chunk, shared).expert;
    }
    const int row = expert * arguments.n + cursor.row_block * kItemRows;
    const int scale_row = expert * arguments.items_per_chunk + cursor.row_block;
    const float* scales = arguments.weight_scales + int64_t{scale_row} * cursor.k_blocks;
#pragma unroll 1
    for (int k = cursor.first; k < cursor.last; ++k, ring.Next()) {
      uint64_t* full = &shared.full[ring.stage];
      BarrierWait(&shared.empty[ring.stage], ring.parity ^ 1);
      sm90::BarrierExpectBytes(full, kUnitBytes);
      sm90::CopyBox(shared.stages[ring.stage].weight, &map, k * kBlock, row, full, policy);
      CopyFourBytes(&shared.weight_scales[ring.stage], scales + k);
      ArriveAfterCopies(full);
    }
  }
  WaitForCopies();
}

// One warp's copies of activations. Lane l copies 16-byte piece l % 8 of every fourth token's 128
// bytes, and the factors of tokens l and l + 32.
template <int kTokens>
class TokenCopier {
 public:
  __device__ TokenCopier() : lane_(threadIdx.x % 32) {}

  template <typename Shared>
  __device__ void Enter(const Arguments& arguments, int chunk_index, const Shared& shared) {
    const ExpertChunk chunk = ChunkOf<kTokens>(arguments, chunk_index, shared);
    count_ = chunk.count;
    unsigned rows[kRowsPerLane];
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) {
      rows[i] = InputRow(arguments, chunk.begin + min(lane_ + 32 * i, count_ - 1), shared);
      scales_[i] = rows[i] * arguments.k_blocks;
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int token = lane_ / 8 + 4 * i;
      values_[i] =
          __shfl_sync(~0u, rows[token / 32], token % 32) * arguments.x_row_bytes + lane_ % 8 * 16;
    }
  }

  template <typename Shared>
  __device__ void Copy(const Arguments& arguments, int k, int stage, Shared& shared) const {
    unsigned char* target = shared.stages[stage].x + lane_ / 8 * kBlock;
    const int piece = (lane_ % 8 ^ lane_ / 8) * 16;  // of tokens below 4; of the next 4 it is ^ 64
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (lane_ / 8 + 4 * i < count_) {
        CopySixteenBytes(target + 4 * i * kBlock + (piece ^ i % 2 * 64),
                         arguments.x + values_[i] + k * kBlock);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) {
      if (lane_ + 32 * i < count_) {
        CopyFourBytes(&shared.x_scales[stage][lane_ + 32 * i], arguments.x_scales + scales_[i] + k);
      }
    }
    ArriveAfterCopies(&shared.full[stage]);
  }

 private:
  static constexpr int kSteps = kTokens / 4;
  static constexpr int kRowsPerLane = (kTokens + 31) / 32;

  int lane_;
  int count_ = 0;
  unsigned values_[kSteps];
  unsigned scales_[kRowsPerLane];
};

// The first round of the ring: all warps but the one that copies weights, a stage each.
template <int kTokens, int kStages, typename Shared>
__device__ void CopyFirstActivations(const Arguments& arguments, const Work& work, Shared& shared) {
  TokenCopier<kTokens> copier;
  const int stage = threadIdx.x / 32;
  const unsigned unit = min(work.begin + stage, work.end - 1);
  const Cursor cursor(arguments, unit, work.end);
  copier.Enter(arguments, cursor.chunk, shared);
  sm90::WaitForPredecessors();
  if (stage < kStages && work.begin + stage < work.end) {
    copier.Copy(arguments, cursor.first, stage, shared);
  }
}

// The other rounds; one warp.
template <int kTokens, int kStages, typename Shared>
__device__ void CopyActivations(const Arguments& arguments, const Work& work, Shared& shared) {
  TokenCopier<kTokens> copier;
  Ring<kStages> ring;
  ring.parity = 1;
  const unsigned begin = min(work.begin + kStages, work.end);
#pragma unroll 1
  for (Cursor cursor(arguments, begin, work.end); !cursor.Done(); cursor.Next()) {
    if (cursor.enters_chunk) copier.Enter(arguments, cursor.chunk, shared);
#pragma unroll 1
    for (int k = cursor.first; k < cursor.last; ++k, ring.Next()) {
      BarrierWait(&shared.empty[ring.stage], ring.parity ^ 1);
      copier.Copy(arguments, k, ring.stage, shared);
    }
  }
  WaitForCopies();
}

// --- the warpgroups that compute

// Where this thread's accumulators stand (sm90.cuh).
struct Place {
  int thread, group, warp, lane;
  __device__ Place()
      : thread(threadIdx.x), group(thread / 128), warp(thread / 32 % 4), lane(thread % 32) {}
  __device__ int row(int i) const { return warp * 16 + lane / 4 + ((i >> 1) & 1) * 8; }
  __device__ int token(int i) const { return 2 * (lane % 4) + (i & 1) + (i >> 2) * 8; }
};

template <int kTokens, typename Shared>
__device__ void StartProducts(int stage, const Place& place, const Shared& shared,
                              float (&products)[kTokens / 2]) {
  const uint32_t weight =
      SharedAddress(shared.stages[stage].weight) + place.group * kTileRows * kBlock;
  const uint32_t x = SharedAddress(shared.stages[stage].x);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    sm90::ProductFp8<kTokens>(products, TileDescriptor(weight + step * 32),
                              TileDescriptor(x + step * 32), step != 0);
  }
}

// What the products of this thread's tokens are worth.
template <int kTokens>
struct Factors {
  float values[kTokens / 4];

  template <typename Shared>
  __device__ Factors(int stage, float weight, const Place& place, const Shared& shared) {
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const float2 x =
          *reinterpret_cast<const float2*>(&shared.x_scales[stage][place.token(4 * j)]);
      values[2 * j] = x.x * weight;
      values[2 * j + 1] = x.y * weight;
    }
  }
  __device__ void Add(const float (&products)[kTokens / 2], float (&sums)[kTokens / 2]) const {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sums[i] += products[i] * values[i / 4 * 2 + i % 2];
  }
};

// sums += the next `count` stages, two at a time; an odd last one is its own twin that counts
// nothing.
template <int kTokens, int kStages, typename Shared>
__device__ void Multiply(int count, const Place& place, Ring<kStages>& ring, Shared& shared,
                         float (&sums)[kTokens / 2]) {
#pragma unroll 1
  for (; count > 0; count -= 2) {
    const bool pair = count > 1;
    const Ring<kStages> first = ring;
    if (pair) ring.Next();
    const int second = ring.stage;
    float products[2][kTokens / 2];
    BarrierWait(&shared.full[first.stage], first.parity);
    BarrierWait(&shared.full[second], ring.parity);
    sm90::FenceForAsyncProxy();
    sm90::ProductsBegin();
    StartProducts<kTokens>(first.stage, place, shared, products[0]);
    StartProducts<kTokens>(second, place, shared, products[1]);
    sm90::ProductsCommit();
    const Factors<kTokens> factors(first.stage, shared.weight_scales[first.stage], place, shared);
    const Factors<kTokens> more(second, pair ? shared.weight_scales[second] : 0.0f, place, shared);
    sm90::ProductsWait<0>();
    sm90::BarrierArriveIf(&shared.empty[first.stage], place.lane == 0);
    sm90::BarrierArriveIf(&shared.empty[second], place.lane == 0 && pair);
    factors.Add(products[0], sums);
    more.Add(products[1], sums);
    ring.Next();
  }
}

// --- sums that several shares have parts of
//
// Only the item that a share begins with can have been begun by another, so one slot per share
// holds what it sends. A slot that nobody wrote yet holds kNothing everywhere; who reads it
// puts that back. Data and signal are the same bytes: no fence, no counter, one trip through the
// L2.

constexpr uint32_t kNothing = ~0u;  // a NaN that no arithmetic produces

__device__ float4* SlotOf(const Arguments& arguments, int floats_per_thread, int share) {
  return reinterpret_cast<float4*>(arguments.partials) +
         static_cast<int64_t>(share) * (floats_per_thread / 4) * kConsumers;
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

template <int kTokens>
__device__ void SendPart(const Arguments& arguments, const Place& place,
                         const float (&sums)[kTokens / 2]) {
  float4* slot = SlotOf(arguments, kTokens / 2, blockIdx.x) + place.thread;
#pragma unroll
  for (int i = 0; i < kTokens / 2; i += 4) {
    Store(slot + i / 4 * kConsumers, make_float4(Something(sums[i]), Something(sums[i + 1]),
                                                 Something(sums[i + 2]), Something(sums[i + 3])));
  }
}

// Adds the parts of the shares after this one up to `last_share`. They wait for nobody and all of
// the grid is resident, so they come.
template <int kTokens>
__device__ void AddParts(const Arguments& arguments, const Place& place, int last_share,
                         float (&sums)[kTokens / 2]) {
  constexpr int kPieces = kTokens / 8;
  constexpr int kInFlight = kPieces >= 4 ? 1 : 4 / kPieces;
#pragma unroll 1
  for (int share = blockIdx.x + 1; share <= last_share; share += kInFlight) {
    float4 parts[kInFlight][kPieces];
    bool waiting;
    do {
      waiting = false;
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const float4* slot =
            SlotOf(arguments, kTokens / 2, min(share + u, last_share)) + place.thread;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) parts[u][i] = Load(slot + i * kConsumers);
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
      float4* slot = SlotOf(arguments, kTokens / 2, share + u) + place.thread;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        sums[4 * i + 0] += parts[u][i].x;
        sums[4 * i + 1] += parts[u][i].y;
        sums[4 * i + 2] += parts[u][i].z;
        sums[4 * i + 3] += parts[u][i].w;
        const float nothing = __uint_as_float(kNothing);
        Store(slot + i * kConsumers, make_float4(nothing, nothing, nothing, nothing));
      }
    }
  }
}

__device__ void Convert(float value, __nv_bfloat16& out) { out = __float2bfloat16(value); }
__device__ void Convert(float value, float& out) { out = value; }

// A warpgroup's [64 rows, tokens] to out[token][row], 16 bytes at a time.
template <int kTokens, typename Out, typename Shared>
__device__ void WriteTile(const Arguments& arguments, const Place& place, const ExpertChunk& chunk,
                          int row, const float (&sums)[kTokens / 2], Shared& shared) {
  constexpr int kPiece = 16 / sizeof(Out);
  constexpr int kPiecesPerToken = kTileRows / kPiece;
  const auto sync = [&] { place.group == 0 ? SyncThreads(1, 128) : SyncThreads(2, 128); };
  auto& tile = shared.out[place.group];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) Convert(sums[i], tile[place.token(i)][place.row(i)]);
  sync();
  const int piece = place.thread % kPiecesPerToken * kPiece;
  int token = place.thread % 128 / kPiecesPerToken;
  Out* target = static_cast<Out*>(arguments.out) +
                int64_t{chunk.begin + token} * arguments.out_stride + row + piece;
#pragma unroll 1
  for (; token < chunk.count; token += 128 / kPiecesPerToken) {
    *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(&tile[token][piece]);
    target += 128 / kPiecesPerToken * arguments.out_stride;
  }
  sync();
}

template <int kTokens, int kStages, typename Out, typename Shared>
__device__ void Compute(const Arguments& arguments, const Work& work, Shared& shared) {
  const Place place;
  Ring<kStages> ring;
  Cursor cursor(arguments, work.begin, work.end);
  ExpertChunk chunk;
#pragma unroll 1
  for (; !cursor.Done(); cursor.Next()) {
    if (cursor.enters_chunk) chunk = ChunkOf<kTokens>(arguments, cursor.chunk, shared);
    float sums[kTokens / 2] = {};
    Multiply<kTokens, kStages>(cursor.last - cursor.first, place, ring, shared, sums);
    if (cursor.first > 0) {
      SendPart<kTokens>(arguments, place, sums);
      continue;
    }
    if (cursor.last < cursor.k_blocks) {
      const unsigned last_unit = work.end + cursor.k_blocks - cursor.last - 1;
      AddParts<kTokens>(arguments, place, work.ShareOf(arguments, last_unit), sums);
    }
    const int row = cursor.row_block * kItemRows + place.group * kTileRows;
    if (row < arguments.n) WriteTile<kTokens, Out>(arguments, place, chunk, row, sums, shared);
  }
}

// --- the kernel

template <int kTokens, int kStages, typename Out>
__global__ __launch_bounds__(kThreads,
                             1) void StreamKernel(const __grid_constant__ CUtensorMap weight_map,
                                                  const __grid_constant__ Arguments arguments) {
  using Shared = SharedMemory<kTokens, kStages, Out>;
  extern __shared__ unsigned char dynamic_shared[];
  Shared& shared = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(dynamic_shared) + 1023) &
                                              ~uintptr_t{1023});
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == kWeightWarp * 32) {
    sm90::PrefetchMap(&weight_map);
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) {
      sm90::BarrierInit(&shared.full[i], kFullArrivals);
      sm90::BarrierInit(&shared.empty[i], kConsumers / 32);
    }
    sm90::BarrierInitFence();
  }
  // Of one matrix, everything about the weights is known before the predecessors end.
  if (arguments.notes != nullptr) sm90::WaitForPredecessors();
  sm90::LetDependentsLaunch();
  const Work work(arguments, LoadChunks<kTokens>(arguments, shared));
  __syncthreads();
  if (blockIdx.x >= work.shares) {
    sm90::WaitForPredecessors();
  } else if (warp == kWeightWarp) {
    if (threadIdx.x % 32 == 0) {
      CopyWeights<kTokens, kStages>(weight_map, arguments, work, shared);
    }
  } else {
    CopyFirstActivations<kTokens, kStages>(arguments, work, shared);
    if (warp == kTokenWarp) {
      CopyActivations<kTokens, kStages>(arguments, work, shared);
    } else {
      Compute<kTokens, kStages, Out>(arguments, work, shared);
      WaitForCopies();
    }
  }
}

// How many units shares take or leave together: with a few at a time fewer shares have a part in
// the same outputs, and with all of a short row of blocks none.
int GrainOf(int k_blocks) {
  int grain = std::min(k_blocks, 4);
  while (k_blocks % grain != 0) --grain;
  return grain;
}

template <int kTokens, int kStages, typename Out>
void LaunchKernel(const CUtensorMap& weight, const Arguments& arguments, int blocks,
                  cudaStream_t stream) {
  static_assert(kStages <= kWeightWarp);  // CopyFirstActivations
  constexpr int kBytes = sizeof(SharedMemory<kTokens, kStages, Out>) + sm90::kTileAlignment;
  static_assert(kBytes <= 227 * 1024);
  const auto kernel = StreamKernel<kTokens, kStages, Out>;
  static const bool sized = [&] {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    return true;
  }();
  (void)sized;
  sm90::LaunchDependent(kernel, blocks, kThreads, kBytes, stream, weight, arguments);
}

template <typename Out>
void LaunchForTokens(int max_count, const CUtensorMap& weight, const Arguments& arguments,
                     int blocks, cudaStream_t stream) {
  if (max_count <= 8) {
    LaunchKernel<8, 9, Out>(weight, arguments, blocks, stream);
  } else {
    LaunchKernel<16, 9, Out>(weight, arguments, blocks, stream);
  }
}

void Launch(const Fp8StreamSm90::Input& x, const Fp8StreamSm90::Weight& weight,
            const Fp8StreamSm90::Output& out, int max_count, int blocks, Arguments arguments,
            cudaStream_t stream) {
  CHECK(Fp8StreamSm90::Supports(weight));
  CHECK_LT(x.rows * x.row_bytes, int64_t{1} << 31);
  arguments.x = static_cast<const unsigned char*>(x.values);
  arguments.x_row_bytes = static_cast<unsigned>(x.row_bytes);
  arguments.x_scales = x.scales;
  arguments.weight_scales = weight.scale_inv;
  arguments.out = out.values;
  arguments.out_stride = out.row_stride;
  arguments.n = weight.n;
  arguments.k_blocks = weight.k / kBlock;
  arguments.items_per_chunk = (weight.n + kItemRows - 1) / kItemRows;
  arguments.grain = GrainOf(arguments.k_blocks);
  arguments.pieces_per_item = arguments.k_blocks / arguments.grain;
  const int64_t items = int64_t{arguments.max_chunks} * arguments.items_per_chunk;
  CHECK_LT(items * arguments.k_blocks * (blocks + 1), int64_t{1} << 31);
  arguments.by_blocks = Quotient(blocks);
  arguments.by_k_blocks = Quotient(arguments.k_blocks);
  arguments.by_items_per_chunk = Quotient(arguments.items_per_chunk);
  const CUtensorMap weight_map = sm90::MapMatrix({.data = const_cast<void*>(weight.values),
                                                  .rows = weight.num_matrices * weight.n,
                                                  .columns = weight.k,
                                                  .box_rows = kItemRows,
                                                  .box_columns = kBlock});
  if (out.type == Fp8StreamSm90::OutputType::kBf16) {
    LaunchForTokens<__nv_bfloat16>(max_count, weight_map, arguments, blocks, stream);
  } else {
    LaunchForTokens<float>(max_count, weight_map, arguments, blocks, stream);
  }
}

}  // namespace

int64_t Fp8StreamSm90::WorkspaceBytes(int num_multiprocessors) {
  return int64_t{num_multiprocessors} * kItemRows * kMaxTokens * sizeof(float);
}

bool Fp8StreamSm90::Supports(const cudaDeviceProp& device) {
  return device.major == 9 && device.minor == 0;
}

bool Fp8StreamSm90::Supports(const Weight& weight) {
  return weight.n % kTileRows == 0 && weight.k % kBlock == 0;
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
  Arguments arguments = {};
  arguments.partials = static_cast<float*>(workspace_);
  arguments.num_rows = static_cast<int>(x.rows);
  arguments.max_chunks = (arguments.num_rows + 7) / 8;
  const int max_count = static_cast<int>(std::min<int64_t>(x.rows, kMaxTokens));
  Launch(x, weight, out, max_count, num_multiprocessors_, arguments, stream);
}

void Fp8StreamSm90::GroupedLinear(const Input& x, const Groups& groups, const Weight& weight,
                                  const Output& out, cudaStream_t stream) const {
  CHECK(groups.max_count >= 1 && groups.max_count <= kMaxTokens);
  if (x.rows == 0) return;
  Arguments arguments = {};
  arguments.partials = static_cast<float*>(workspace_);
  arguments.notes = groups.notes;
  arguments.rows = groups.rows;
  arguments.by_divisor = Quotient(groups.divisor);
  arguments.num_rows = static_cast<int>(groups.num_rows);
  arguments.max_chunks = static_cast<int>(groups.max_chunks);
  Launch(x, weight, out, groups.max_count, num_multiprocessors_, arguments, stream);
}

}  // namespace fathom
