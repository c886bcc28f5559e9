// How tokens come to MlaDecodeSm90's shared memory: its instances, what they keep there, and the
// warps that copy and, from an FP8 cache, convert.
#pragma once

#include <type_traits>

#include "kernels/cuda/mla_decode_combine.cuh"
#include "kernels/cuda/mla_decode_convert.cuh"
#include "kernels/cuda/mla_decode_schedule.cuh"
#include "kernels/cuda/sm90.cuh"

namespace fathom::mla_decode {

using sm90::BarrierArriveIf;
using sm90::BarrierWait;

constexpr int kQueryPanelBytes = kHeads * sm90::kSwizzledRowBytes;
constexpr int kConsumers = 128;   // one warpgroup
constexpr int kAllConsumers = 1;  // named barrier; 2 and 3: halves while combining

// One instance of the kernel. What shared memory is left for beside the rest: 176 tokens, or 144
// where peers send their sums; from an FP8 cache 128 or 96, and 96 as they are stored.
template <int kBlocks, MlaCacheType kStored>
struct FormOf {
  static constexpr int kCluster = kBlocks;
  static constexpr bool kConverts = kStored == MlaCacheType::kFp8;
  static constexpr int kStages = kConverts ? 2 : 3;
  static constexpr int kStageTokens = kCluster == 1 ? 64 : 48;
  static constexpr int kLastStageTokens = kConverts ? kStageTokens : 48;

  static constexpr int kCopyWarp = kConsumers / 32;
  // Registers are handed on among whole warpgroups: with converters, three warps beside the one
  // that copies do nothing.
  static constexpr int kFirstConverter = kConsumers + 128;  // thread
  static constexpr int kThreads = kConverts ? kFirstConverter + kConverters : kConsumers + 32;
};

// Where in the ring of tiles.
template <typename Form>
struct Ring {
  static constexpr int kStageBytes = Form::kStageTokens / kGroupTokens * kGroupBytes;
  static constexpr int kBytes =
      (Form::kStages - 1) * kStageBytes + Form::kLastStageTokens / kGroupTokens * kGroupBytes;

  int stage = 0;
  int parity = 0;

  __device__ int Capacity() const {
    return stage == Form::kStages - 1 ? Form::kLastStageTokens : Form::kStageTokens;
  }
  __device__ void Next() {
    if (++stage == Form::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Arguments {
  MlaDecodeSm90::Layer layer;
  const unsigned char* stored;  // an FP8 cache
  int block_size;
  float scale_log2;
  Plan plan;
  Partials partials;
};

// What the blocks of a cluster send each other: block r gets the r-th slice of everyone's sums.
template <int kCluster>
struct Received {
  float4 sums[kCluster][kPositions / kCluster];
  float4 largest[kCluster][4];  // per quad of heads
  float4 totals[kCluster][4];
};
template <>
struct Received<1> {};

struct NothingStored {};

template <typename Form>
struct alignas(1024) SharedMemory {
  static constexpr int kCluster = Form::kCluster, kStages = Form::kStages;
  unsigned char kv[Ring<Form>::kBytes];
  // Directly behind kv: the products of a short last stage read on into it, for rows that are cut.
  unsigned char query[kPanels * kQueryPanelBytes];
  alignas(1024) unsigned char probabilities[kHeads * sm90::kSwizzledRowBytes];  // P', bf16
  Received<kCluster> received;
  float warp_values[4][kHeads];
  uint64_t full[kStages];
  uint64_t empty[kStages];
  uint64_t arrived;     // what peers sent of the row
  uint64_t peers_done;  // all blocks of the cluster have read what they were sent
  std::conditional_t<Form::kConverts, StoredTokens, NothingStored> stored;
};
static_assert(2 * kGroupBytes <= kPanels * kQueryPanelBytes);
static_assert(2 * sizeof(CombineScratch) <= Ring<FormOf<2, MlaCacheType::kFp8>>::kBytes);

struct Range {
  int begin, end;
};

// The tokens of an item that a block of the cluster takes.
template <int kCluster>
__device__ Range TokensOf(const Item& item, int rank) {
  const int units = (item.end - item.begin + kUnitTokens - 1) / kUnitTokens;
  return {item.begin + units * rank / kCluster * kUnitTokens,
          min(item.end, item.begin + units * (rank + 1) / kCluster * kUnitTokens)};
}

__device__ inline Item ItemOf(const Plan& plan, const Share& share, int row) {
  return row == share.first_row ? share.first : plan.later[row];
}

// --- the warps that copy and convert

// Where groups of eight tokens stand in the cache: each lane knows one of 32 and one of the next.
struct Places {
  const int* block_table;
  int block_size;
  Range tokens;
  int now, next;

  __device__ int Find(int group) const {
    const int token = tokens.begin + group * kGroupTokens;
    if (token >= tokens.end) return 0;
    return block_table[token / block_size] * block_size + token % block_size;
  }
  __device__ void Begin(int lane) {
    now = Find(lane);
    next = Find(32 + lane);
  }
  // Of the lane-th group from `group` on, lane < 8; called with ascending groups.
  __device__ int At(int group, int lane) const {
    const int wanted = group % 32 + lane;
    const int from_now = __shfl_sync(~0u, now, wanted % 32);
    const int from_next = __shfl_sync(~0u, next, wanted % 32);
    return wanted < 32 ? from_now : from_next;
  }
  __device__ void Advance(int group, int groups, int lane) {
    if (group / 32 == (group + groups) / 32) return;
    now = next;
    next = Find((group + groups) / 32 * 32 + 32 + lane);
  }
};

// Calls visit(tokens, item) for each of a share's rows.
template <typename Form, typename Visit>
__device__ void VisitRows(const Arguments& arguments, const Share& share, int rank, Visit visit) {
  for (int row = share.first_row; row <= share.last_row; ++row) {
    const Item item = ItemOf(arguments.plan, share, row);
    visit(TokensOf<Form::kCluster>(item, rank), item);
  }
}

// To the ring, or from an FP8 cache to where the converting warps take them up.
template <typename Form>
__device__ void CopyTiles(const CUtensorMap& map, const Arguments& arguments, const Share& share,
                          int rank, int lane, SharedMemory<Form>& shared) {
  const MlaDecodeSm90::Layer& layer = arguments.layer;
  const uint64_t policy = sm90::EvictFirstPolicy();
  bool waited = layer.start != MlaDecodeSm90::Start::kEarly;
  Ring<Form> ring;
  int copied = 0;  // groups, of all rows
  VisitRows<Form>(arguments, share, rank, [&](Range tokens, const Item& item) {
    Places places = {layer.block_tables + int64_t{item.sequence} * layer.max_blocks,
                     arguments.block_size, tokens};
    places.Begin(lane);
    int group = 0;
    for (int token = tokens.begin; token < tokens.end; ring.Next()) {
      const int count = min(ring.Capacity(), tokens.end - token);
      if (!waited && token + count > item.fresh) {
        sm90::WaitForPredecessors();
        waited = true;
      }
      const int groups = (count + kGroupTokens - 1) / kGroupTokens;
      const int place = places.At(group, lane);
      if constexpr (Form::kConverts) {
        if (lane < groups) {
          const StoredSlot to(copied + lane);
          uint64_t* full = &shared.stored.full[to.slot];
          BarrierWait(&shared.stored.empty[to.slot], to.parity ^ 1);
          sm90::BarrierExpectBytes(full, kStoredGroupBytes);
          sm90::CopyBytes(shared.stored.bytes[to.slot],
                          arguments.stored + int64_t{place} * mla_stored_token::kBytes,
                          kStoredGroupBytes, full, policy);
        }
        __syncwarp();
        copied += groups;
      } else {
        uint64_t* full = &shared.full[ring.stage];
        BarrierWait(&shared.empty[ring.stage], ring.parity ^ 1);
        if (lane == 0) sm90::BarrierExpectBytes(full, groups * kGroupBytes);
        __syncwarp();
        if (lane < groups) {
          sm90::CopyPanels(shared.kv + ring.stage * Ring<Form>::kStageBytes + lane * kGroupBytes,
                           &map, place, full, policy);
        }
      }
      places.Advance(group, groups, lane);
      group += groups;
      token += count;
    }
  });
}

// The warps that make tiles of what an FP8 cache stores.
template <typename Form>
__device__ void ConvertTiles(const Arguments& arguments, const Share& share, int rank, int thread,
                             SharedMemory<Form>& shared) {
  const bool speaks = thread % 32 == 0;  // for its warp
  Ring<Form> ring;
  int converted = 0;  // groups, of all rows
  VisitRows<Form>(arguments, share, rank, [&](Range tokens, const Item&) {
    for (int token = tokens.begin; token < tokens.end; ring.Next()) {
      const int count = min(ring.Capacity(), tokens.end - token);
      unsigned char* tile = shared.kv + ring.stage * Ring<Form>::kStageBytes;
      BarrierWait(&shared.empty[ring.stage], ring.parity ^ 1);
      for (int first = 0; first < count; first += kGroupTokens, tile += kGroupBytes) {
        const StoredSlot from(converted++);
        BarrierWait(&shared.stored.full[from.slot], from.parity);
        ConvertGroup(shared.stored.bytes[from.slot], thread, tile);
        __syncwarp();
        BarrierArriveIf(&shared.stored.empty[from.slot], speaks);
      }
      sm90::FenceForAsyncProxy();
      __syncwarp();
      BarrierArriveIf(&shared.full[ring.stage], speaks);
      token += count;
    }
  });
}

}  // namespace fathom::mla_decode
