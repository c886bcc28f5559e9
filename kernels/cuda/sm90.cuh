// Hopper's own instructions, one thin function each: barriers in shared memory, the tensor copy
// engine (TMA), warpgroup matrix products (wgmma).
//
// Shared-memory tiles are rows of 128 bytes under the 128-byte swizzle: the 16-byte piece c of row
// r stands at r * 128 + ((c ^ (r & 7)) * 16), and a tile begins at a multiple of 1024 bytes.
// What includes this is compiled for sm_90a alone.
// Source: PTX ISA 9.0, "Asynchronous warpgroup level matrix instructions", "Tensor copies".
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/dependent_launch.cuh"

namespace fathom::sm90 {

inline constexpr int kSwizzledRowBytes = 128;
inline constexpr int kTileAlignment = 1024;

__device__ inline uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- barriers in shared memory

__device__ inline void BarrierInit(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(arrivals));
}
// After BarrierInit, before other threads or the copy engine use the barriers.
__device__ inline void BarrierInitFence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives once and announces how many bytes copies will bring in this phase.
__device__ inline void BarrierExpectBytes(uint64_t* barrier, int num_bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(num_bytes)
      : "memory");
}
// A predicate instead of a branch: a branch while wgmma runs makes the compiler serialise it.
__device__ inline void BarrierArriveIf(uint64_t* barrier, bool condition) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::
          "r"(SharedAddress(barrier)),
      "r"(static_cast<int>(condition))
      : "memory");
}
// Waits for the phase with this parity to complete.
__device__ inline void BarrierWait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT%=:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE%=;\nbra WAIT%=;\nDONE%=:\n}" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}
// A named barrier (1 to 15; 0 is __syncthreads) of some of the block's threads.
__device__ inline void SyncThreads(int name, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(num_threads) : "memory");
}
// Shared memory written by ordinary stores is about to be read by wgmma or the copy engine.
__device__ inline void FenceForAsyncProxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- copies

// For data that is read once: leave the L2 to others.
__device__ inline uint64_t EvictFirstPolicy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// For data that several blocks will read soon.
__device__ inline uint64_t EvictLastPolicy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// One box of a two-dimensional tensor map, from (column, row), into a swizzled tile.
__device__ inline void CopyBox(void* target, const CUtensorMap* map, int column, int row,
                               uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(SharedAddress(target)),
      "l"(map), "r"(SharedAddress(barrier)), "r"(column), "r"(row), "l"(policy)
      : "memory");
}
// Some rows of a MapPanels map, from `row`: panel after panel, each a swizzled tile.
__device__ inline void CopyPanels(void* target, const CUtensorMap* map, int row, uint64_t* barrier,
                                  uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %3}], [%2], %5;" ::"r"(SharedAddress(target)),
      "l"(map), "r"(SharedAddress(barrier)), "r"(0), "r"(row), "l"(policy)
      : "memory");
}
__device__ inline void PrefetchMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// --- matrix products of a warpgroup (128 threads): D[64, N] += A[64, K] · B[N, K]ᵀ
//
// Accumulators: thread (warp w of the group, lane l) holds rows 16w + l/4 and + 8, columns
// 2(l % 4) + {0, 1} + 8j as d[4j + {0, 1}] and d[4j + {2, 3}].

// How wgmma finds a swizzled tile: its address, and the bytes between groups of eight rows.
template <int kEightRowsBytes = 8 * kSwizzledRowBytes>
__device__ inline uint64_t TileDescriptor(uint32_t shared_address) {
  constexpr uint64_t kEightRows = kEightRowsBytes;
  return static_cast<uint64_t>((shared_address & 0x3FFFF) >> 4) | (kEightRows >> 4) << 16 |
         (kEightRows >> 4) << 32 | uint64_t{1} << 62;
}

// A as stored ([64 rows, 16 columns]) or transposed ([16 rows, 64 columns], read by column).
enum class OperandA { kAsStored, kTransposed };

// N = 16, K = 16, bf16.
template <OperandA kOperandA>
__device__ inline void ProductBf16N16(float (&d)[8], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, p, 1, 1, %11, 0;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7])
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)),
        "n"(kOperandA == OperandA::kTransposed ? 1 : 0));
}

// N = 8 or 16, K = 32, e4m3.
template <int kN>
__device__ inline void ProductFp8(float* d, uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (kN == 8) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0,%1,%2,%3}, %4, %5, p, 1, 1;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  } else {
    static_assert(kN == 16);
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 "
        "{%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, p, 1, 1;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7])
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  }
}

// Before the first product of a run, and again after every wait on a barrier between products.
__device__ inline void ProductsBegin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void ProductsCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending committed groups are still running.
template <int kPending>
__device__ inline void ProductsWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// --- clusters: blocks that write into each other's shared memory

__device__ inline int ClusterRank() {
  int rank;
  asm volatile("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Every thread of the cluster arrives once; whoever waits then sees the barriers that the other
// blocks made.
__device__ inline void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void ClusterWait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What stands at this address of one's own shared memory, in that of another block.
__device__ inline uint32_t PeerAddress(uint32_t shared_address, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address), "r"(rank));
  return address;
}
// Counts as 16 bytes at that block's barrier when it has arrived.
__device__ inline void StoreToPeer(uint32_t peer_address, float4 value, uint32_t peer_barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(peer_address),
      "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(peer_barrier)
      : "memory");
}
__device__ inline void ArriveAtPeer(uint32_t peer_barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(peer_barrier)
               : "memory");
}
// As BarrierWait, where other blocks of the cluster arrive.
__device__ inline void BarrierWaitForPeers(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT%=:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE%=;\nbra WAIT%=;\nDONE%=:\n}" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}

using cuda::LetDependentsLaunch;
using cuda::WaitForPredecessors;

}  // namespace fathom::sm90
