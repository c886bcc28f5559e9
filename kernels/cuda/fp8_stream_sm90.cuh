// How fp8_stream_sm90.cu's kernel divides its work, and the warps of it that copy: weights, a
// thread by the copy engine; activations, which may be gathered, 16 bytes per lane. (Activations
// that the kernel makes itself, of gate and up, are its own file's.)
//
// Words: an item is a form's weight rows of one matrix times one chunk of tokens; a unit is one K
// block (128 columns) of it, which is also one stage of the ring; a share is the units of one
// thread block. Where the matrices are joined, an item is the same rows of all that have a chunk,
// whose K blocks follow each other as if there were one long matrix.
//
// With one token a layer takes a few thousand cycles, and instructions that run once cost more to
// fetch than to execute. So loops that run once or twice are not unrolled, and one instance of the
// kernel knows one width of the matrix products.
#pragma once

#include "kernels/cuda/expert_chunks.h"
#include "kernels/cuda/sm90.cuh"

namespace fathom::fp8_stream {

using sm90::BarrierWait;
using sm90::SharedAddress;

constexpr int kTileRows = 64;  // of a warpgroup's matrix products
constexpr int kBlock = 128;    // columns under one factor; one byte each
constexpr int kTileBytes = kTileRows * kBlock;
constexpr int kKnownChunks = 432;  // that are kept in shared memory
constexpr int kKnownRows = 128;

// Rows in 1×128; or gate and up of one token's experts, bf16, of which the kernel makes them, and
// joins the matrices.
enum class Reads { kCodes, kGateUp };

// One instance of the kernel: its items are 64 · kRowGroups weight rows times at most kMaxTokens
// tokens. kRowGroups · kTurns warpgroups compute: one per 64 rows, and kTurns that take turns with
// the K blocks. Many turns are for few tokens, where the time between the last activation's arrival
// and the end counts; several rows for many, where the number of stages does.
// kTeamsOfItems: so many teams of these warpgroups take turns with the items, where an item is so
// short that what comes after its products is most of its time. Its units must fit the ring.
// kKeeps: its output has a policy of its own (Output::kept); otherwise it is forgotten first.
template <Reads kWhat, int kMaxTokens, int kRowGroups, int kTurnsOfBlocks, int kTeamsOfItems,
          int kRingStages, bool kKeeps = false>
struct FormOf {
  static constexpr bool kKeepsOutput = kKeeps;
  static constexpr bool kJoins = kWhat == Reads::kGateUp;
  static constexpr int kTokens = kMaxTokens;
  static constexpr int kRows = kRowGroups;
  static constexpr int kTurns = kTurnsOfBlocks;
  static constexpr int kTeams = kTeamsOfItems;
  static constexpr int kStages = kRingStages;
  static_assert(kStages % kTurns == 0);
  static_assert(kTurns == 1 ? kTeams * kRows <= 6 : kTeams * kRows == 1);  // named barriers

  static constexpr int kConsumers = kTeams * kRows * kTurns * 128;
  static constexpr int kTokenWarp = kConsumers / 32;  // copies activations and their factors
  static constexpr int kMakers = 4;                   // warps that make them instead
  static constexpr int kMakerLanes = 16;              // that make those of a unit
  static constexpr int kWeightWarp = kTokenWarp + (kJoins ? kMakers : 1);
  static constexpr int kThreads = (kWeightWarp + 1) * 32;
  // At a stage's barrier: the weights, their factor, each lane that brings activations.
  static constexpr int kFullArrivals = 1 + 1 + (kJoins ? kMakerLanes : 32);
  static constexpr int kItemRows = kRows * kTileRows;
  static constexpr int kBatch = 2;  // K blocks that a warpgroup multiplies at a time
};

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
  const unsigned char* x;  // or gate and up
  const float* x_scales;
  const float* weight_scales;
  const int* notes;     // null: one matrix
  bool complete_early;  // notes and rows (Fp8StreamSm90::Groups)
  const int* rows;      // sorted row to row of x, times divisor; null: the same
  const float* shares;  // of the token's choices, where matrices are joined
  void* out;
  float kept;       // which share of the output the L2 should keep
  float* partials;  // [shares][tokens / 8][128 * rows][4]
  int64_t out_stride;
  unsigned x_row_bytes;  // all of x is below 2³¹ bytes (CHECKed by the host)
  int num_rows;          // sorted ones, or of one matrix
  int max_chunks;        // that notes have room for
  int n;
  int k_blocks;
  int items_per_chunk;
  int scale_rows;       // of one matrix
  int grain;            // units that a share takes or leaves together; divides k_blocks
  int pieces_per_item;  // k_blocks / grain
  Quotient by_divisor, by_blocks, by_k_blocks, by_items_per_chunk;
};

template <typename Form, typename Out>
struct SharedMemory {
  static constexpr int kTokens = Form::kTokens, kStages = Form::kStages;
  static constexpr bool kAdds = Form::kTurns > 1;
  static constexpr int kPitch = kTileRows + 16 / sizeof(Out);  // bank conflicts
  alignas(sm90::kTileAlignment) unsigned char weight[kStages][Form::kItemRows * kBlock];
  alignas(sm90::kTileAlignment) unsigned char x[kStages][kTokens * kBlock];
  float x_scales[kStages][kTokens];
  float weight_scales[kStages];
  alignas(16) Out out[Form::kTeams * Form::kRows][kTokens][kPitch];
  // What the warpgroups of the same rows add up.
  float4 sums[kAdds ? Form::kTurns - 1 : 1][kAdds ? kTokens / 8 : 1]
             [kAdds ? Form::kItemRows * 2 : 1];
  uint64_t full[kStages];
  uint64_t empty[kStages];
  int4 chunks[kKnownChunks];
  int rows[kKnownRows];
};

// --- who does what

// Of P pieces of `grain` units, share i of S owns [P * i / S, P * (i + 1) / S).
template <typename Form>
struct Work {
  unsigned pieces;  // times shares it stays below 2³¹ (CHECKed by the host)
  unsigned shares;
  unsigned begin, end;  // this block's units
  int k_blocks;         // of an item

  __device__ Work(const Arguments& arguments, int num_chunks)
      : pieces(num_chunks * arguments.items_per_chunk * arguments.pieces_per_item),
        shares(min(gridDim.x, pieces)),
        begin(Begin(arguments, blockIdx.x)),
        end(Begin(arguments, blockIdx.x + 1)),
        k_blocks(arguments.k_blocks * (Form::kJoins ? num_chunks : 1)) {}

  __device__ unsigned Begin(const Arguments& arguments, unsigned share) const {
    const unsigned piece = shares < gridDim.x ? share : arguments.by_blocks(pieces * share);
    return piece * arguments.grain;
  }
  __device__ int ShareOf(const Arguments& arguments, unsigned unit) const {
    return ((unit / arguments.grain + 1) * shares - 1) / pieces;
  }
  __device__ unsigned ItemOf(const Arguments& arguments, unsigned unit) const {
    return Form::kJoins ? unit / k_blocks : arguments.by_k_blocks(unit);
  }
};

// Asks for all that the kernel before wrote about the rows at once. Returns the number of chunks.
template <typename Form, typename Shared>
__device__ int LoadChunks(const Arguments& arguments, Shared& shared) {
  if (arguments.notes == nullptr) return (arguments.num_rows + Form::kTokens - 1) / Form::kTokens;
  const int4* chunks = reinterpret_cast<const int4*>(arguments.notes + kFirstChunkNote);
#pragma unroll 1
  for (int i = threadIdx.x; i < min(kKnownChunks, arguments.max_chunks); i += Form::kThreads) {
    sm90::CopySixteen(SharedAddress(&shared.chunks[i]), &chunks[i]);
  }
  if (arguments.rows != nullptr && threadIdx.x < min(kKnownRows, arguments.num_rows)) {
    sm90::CopyFour(SharedAddress(&shared.rows[threadIdx.x]), &arguments.rows[threadIdx.x]);
  }
  const int num_chunks = __ldcg(arguments.notes);
  sm90::WaitForCopies();
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
// Which choice a sorted row is, and which row of x.
template <typename Shared>
__device__ unsigned ChoiceOf(const Arguments& arguments, int row, const Shared& shared) {
  return row < kKnownRows ? shared.rows[row] : arguments.rows[row];
}
template <typename Shared>
__device__ unsigned InputRow(const Arguments& arguments, int row, const Shared& shared) {
  if (arguments.rows == nullptr) return row;
  return arguments.by_divisor(ChoiceOf(arguments, row, shared));
}

// Walks the units of a share from `begin` on, item by item.
struct Cursor {
  int k_blocks, items_per_chunk;
  int units;        // left, this item's included
  int first, last;  // K blocks of the item
  int chunk, row_block;
  bool enters_chunk = true;

  template <typename Form>
  __device__ Cursor(const Arguments& arguments, const Work<Form>& work, unsigned begin)
      : k_blocks(work.k_blocks), items_per_chunk(arguments.items_per_chunk) {
    const unsigned item = work.ItemOf(arguments, begin);
    units = work.end - begin;
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
  __device__ void Next(int steps = 1) {  // at most kStages
    stage += steps;
    if (stage >= kStages) {
      stage -= kStages;
      parity ^= 1;
    }
  }
};

// --- the warps that copy

// Weights and their factors; one thread.
template <typename Form, typename Shared>
__device__ void CopyWeights(const CUtensorMap& map, const Arguments& arguments,
                            const Work<Form>& work, Shared& shared) {
  constexpr int kBytes = Form::kItemRows * kBlock;
  const uint64_t policy = sm90::EvictFirstPolicy();
  const auto expert_of = [&](int chunk) {
    return ChunkOf<Form::kTokens>(arguments, chunk, shared).expert;
  };
  Ring<Form::kStages> ring;
  int expert = 0;
#pragma unroll 1
  for (Cursor cursor(arguments, work, work.begin); !cursor.Done(); cursor.Next()) {
    if (!Form::kJoins && cursor.enters_chunk) expert = expert_of(cursor.chunk);
    const int row = cursor.row_block * Form::kItemRows;
    const auto scales_of = [&] {
      const int scale_row = expert * arguments.scale_rows + row / kBlock;
      return arguments.weight_scales + int64_t{scale_row} * arguments.k_blocks;
    };
    const float* scales = scales_of();
#pragma unroll 1
    for (int k = cursor.first; k < cursor.last; ++k, ring.Next()) {
      int block = k;
      if constexpr (Form::kJoins) {
        const int chunk = arguments.by_k_blocks(k);
        expert = expert_of(chunk);
        block -= chunk * arguments.k_blocks;
        scales = scales_of();
      }
      uint64_t* full = &shared.full[ring.stage];
      BarrierWait(&shared.empty[ring.stage], ring.parity ^ 1);
      sm90::BarrierExpectBytes(full, kBytes);
      sm90::CopyBox(shared.weight[ring.stage], &map, block * kBlock, expert * arguments.n + row,
                    full, policy);
      sm90::CopyFour(SharedAddress(&shared.weight_scales[ring.stage]), scales + block);
      sm90::BarrierArriveAfterCopies(full);
    }
  }
  sm90::WaitForCopies();
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
    const uint32_t target = SharedAddress(shared.x[stage]) + lane_ / 8 * kBlock;
    const int piece = (lane_ % 8 ^ lane_ / 8) * 16;  // of tokens below 4; of the next 4 it is ^ 64
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (lane_ / 8 + 4 * i < count_) {
        sm90::CopySixteen(target + 4 * i * kBlock + (piece ^ i % 2 * 64),
                          arguments.x + values_[i] + k * kBlock);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) {
      if (lane_ + 32 * i < count_) {
        sm90::CopyFour(SharedAddress(&shared.x_scales[stage][lane_ + 32 * i]),
                       arguments.x_scales + scales_[i] + k);
      }
    }
    sm90::BarrierArriveAfterCopies(&shared.full[stage]);
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
template <typename Form, typename Shared>
__device__ void CopyFirstActivations(const Arguments& arguments, const Work<Form>& work,
                                     Shared& shared) {
  TokenCopier<Form::kTokens> copier;
  const unsigned count = min(static_cast<unsigned>(Form::kStages), work.end - work.begin);
#pragma unroll 1
  for (unsigned stage = threadIdx.x / 32; stage < Form::kStages; stage += Form::kWeightWarp) {
    const unsigned unit = work.begin + min(stage, count - 1);
    const Cursor cursor(arguments, work, unit);
    copier.Enter(arguments, cursor.chunk, shared);
    sm90::WaitForPredecessors();
    if (stage < count) copier.Copy(arguments, cursor.first, stage, shared);
  }
  sm90::WaitForPredecessors();
}

// The other rounds; one warp.
template <typename Form, typename Shared>
__device__ void CopyActivations(const Arguments& arguments, const Work<Form>& work,
                                Shared& shared) {
  TokenCopier<Form::kTokens> copier;
  Ring<Form::kStages> ring;
  ring.parity = 1;
  const unsigned begin = min(work.begin + Form::kStages, work.end);
#pragma unroll 1
  for (Cursor cursor(arguments, work, begin); !cursor.Done(); cursor.Next()) {
    if (cursor.enters_chunk) copier.Enter(arguments, cursor.chunk, shared);
#pragma unroll 1
    for (int k = cursor.first; k < cursor.last; ++k, ring.Next()) {
      BarrierWait(&shared.empty[ring.stage], ring.parity ^ 1);
      copier.Copy(arguments, k, ring.stage, shared);
    }
  }
  sm90::WaitForCopies();
}

}  // namespace fathom::fp8_stream
