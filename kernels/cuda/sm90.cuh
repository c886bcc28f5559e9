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

// What begins at the first tile of a kernel's dynamic shared memory. Found by an offset: a pointer
// made from an integer is no longer known to be of shared memory, and every access through it is a
// generic one, which is slower and takes 64-bit addresses.
template <typename T>
__device__ inline T& AtFirstTile(unsigned char* dynamic_shared) {
  const uint32_t past = SharedAddress(dynamic_shared) % kTileAlignment;
  return *reinterpret_cast<T*>(dynamic_shared + (kTileAlignment - past) % kTileAlignment);
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
// Both, of threads that need nothing in between.
__device__ inline void ClusterSync() {
  ClusterArrive();
  ClusterWait();
}
__device__ inline float4 LoadFromPeer(uint32_t peer_address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(peer_address)
               : "memory");
  return v;
}
// Arrives in block `rank` at the barrier that stands there at this one's place. For blocks that
// only free memory for one another: what this thread wrote elsewhere need not be visible there.
__device__ inline void BarrierArriveInCluster(uint64_t* barrier, int rank, bool condition) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n"
      "@p mbarrier.arrive.shared::cluster.b64 _, [%0];\n}" ::"r"(
          PeerAddress(SharedAddress(barrier), rank)),
      "r"(static_cast<int>(condition))
      : "memory");
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
__device__ inline uint64_t EvictNormalPolicy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
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
// The same box, at the same place of the shared memory of every block of the cluster in `blocks` (a
// bit each), completing on the barrier that stands in each of them at this one's place.
__device__ inline void CopyBoxToCluster(void* target, const CUtensorMap* map, int column, int row,
                                        uint64_t* barrier, uint16_t blocks, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(
          SharedAddress(target)),
      "l"(map), "r"(SharedAddress(barrier)), "r"(column), "r"(row), "h"(blocks), "l"(policy)
      : "memory");
}
// Consecutive bytes, a multiple of 16, both ends 16-byte aligned.
__device__ inline void CopyBytes(void* target, const void* source, int num_bytes, uint64_t* barrier,
                                 uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(SharedAddress(target)),
      "l"(source), "r"(num_bytes), "r"(SharedAddress(barrier)), "l"(policy)
      : "memory");
}
// 16 bytes, by the thread itself; see BarrierArriveAfterCopies. FenceForAsyncProxy before wgmma.
__device__ inline void CopySixteen(uint32_t target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}
__device__ inline void CopyFour(uint32_t target, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(source) : "memory");
}
__device__ inline void WaitForCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// This thread arrives once all it has copied so far is there.
__device__ inline void BarrierArriveAfterCopies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(SharedAddress(barrier))
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

// N = 8, 16, or 32 to 128 in steps of 16, K = 32, e4m3; d: N / 2 floats.
#define FATHOM_FLOATS_8(d, i)                                                                 \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
template <int kN>
__device__ inline void ProductFp8(float* d, uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (kN == 8) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0,%1,%2,%3}, %4, %5, p, 1, 1;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  } else if constexpr (kN == 16) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 "
        "{%0,%1,%2,%3,%4,%5,%6,%7}, "
        "%8, %9, p, 1, 1;\n}"
        : FATHOM_FLOATS_8(d, 0)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  } else if constexpr (kN == 32) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
        "%16, %17, p, 1, 1;\n}"
        : FATHOM_FLOATS_8(d, 0), FATHOM_FLOATS_8(d, 8)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  } else if constexpr (kN == 48) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %26, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n48k32.f32.e4m3.e4m3 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,"
        "%22,%23}, "
        "%24, %25, p, 1, 1;\n}"
        : FATHOM_FLOATS_8(d, 0), FATHOM_FLOATS_8(d, 8), FATHOM_FLOATS_8(d, 16)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  } else if constexpr (kN == 64) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,"
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
        "%32, %33, p, 1, 1;\n}"
        : FATHOM_FLOATS_8(d, 0), FATHOM_FLOATS_8(d, 8), FATHOM_FLOATS_8(d, 16),
          FATHOM_FLOATS_8(d, 24)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  } else if constexpr (kN == 80) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %42, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n80k32.f32.e4m3.e4m3 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,"
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39}, "
        "%40, %41, p, 1, 1;\n}"
        : FATHOM_FLOATS_8(d, 0), FATHOM_FLOATS_8(d, 8), FATHOM_FLOATS_8(d, 16),
          FATHOM_FLOATS_8(d, 24), FATHOM_FLOATS_8(d, 32)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  } else if constexpr (kN == 96) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %50, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k32.f32.e4m3.e4m3 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,"
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,"
        "%41,%42,%43,%44,%45,%46,%47}, "
        "%48, %49, p, 1, 1;\n}"
        : FATHOM_FLOATS_8(d, 0), FATHOM_FLOATS_8(d, 8), FATHOM_FLOATS_8(d, 16),
          FATHOM_FLOATS_8(d, 24), FATHOM_FLOATS_8(d, 32), FATHOM_FLOATS_8(d, 40)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  } else if constexpr (kN == 112) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %58, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n112k32.f32.e4m3.e4m3 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,"
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,"
        "%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55}, "
        "%56, %57, p, 1, 1;\n}"
        : FATHOM_FLOATS_8(d, 0), FATHOM_FLOATS_8(d, 8), FATHOM_FLOATS_8(d, 16),
          FATHOM_FLOATS_8(d, 24), FATHOM_FLOATS_8(d, 32), FATHOM_FLOATS_8(d, 40),
          FATHOM_FLOATS_8(d, 48)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  } else {
    static_assert(kN == 128);
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,"
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,"
        "%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,"
        "%60,%61,%62,%63}, "
        "%64, %65, p, 1, 1;\n}"
        : FATHOM_FLOATS_8(d, 0), FATHOM_FLOATS_8(d, 8), FATHOM_FLOATS_8(d, 16),
          FATHOM_FLOATS_8(d, 24), FATHOM_FLOATS_8(d, 32), FATHOM_FLOATS_8(d, 40),
          FATHOM_FLOATS_8(d, 48), FATHOM_FLOATS_8(d, 56)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  }
}
#undef FATHOM_FLOATS_8

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

using cuda::LetDependentsLaunch;
using cuda::WaitForPredecessors;

// Registers per thread of the calling warpgroup from here on, a multiple of 8. All warps of it call
// this, in one branch of a single if/else over the roles.
template <int kRegisters>
__device__ inline void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Four 8 × 8 matrices of 16-bit elements, held as accumulators are, transposed into the rows of 16
// bytes at each lane's address: lanes 0 to 7 the rows of the first matrix, and so on.
__device__ inline void StoreTransposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                       uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

// The same as they are: rows of 16 bytes are rows of the matrices.
__device__ inline void StoreMatrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                     uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// A swizzled tile to (column, row) of a tensor, less what lies outside of it; by the copy engine,
// in this thread's current group.
__device__ inline void StoreBox(const CUtensorMap* map, int column, int row, const void* source) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(SharedAddress(source)), "r"(column), "r"(row)
      : "memory");
}
__device__ inline void CommitStores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ inline void WaitForStores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Until what this thread has stored so may be overwritten in shared memory.
__device__ inline void WaitForStoresToRead() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

}  // namespace fathom::sm90
