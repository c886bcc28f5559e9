// Wide bf16 matrix products of a warpgroup, D[64, 128] += A[64, 16] · B[128, 16]ᵀ, and what kernels
// made of them need besides: registers handed between warpgroups, accumulators turned into rows.
// Tiles and accumulators are those of sm90.cuh.
// Source: PTX ISA 9.0, "Asynchronous warpgroup level matrix instructions".
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <cstring>

#include "kernels/cuda/sm90.cuh"

namespace fathom::sm90 {

// B stored as [128 rows, 16 columns] of a tile, or as [16 rows, 128 columns] of two tiles.
enum class OperandB { kAsStored, kTransposed };

// Two swizzled tiles that hold columns 0 to 63 and 64 to 127 of the same rows, `tile_bytes` apart.
__device__ inline uint64_t TransposedDescriptor(uint32_t shared_address, int tile_bytes) {
  constexpr uint64_t kEightRows = 8 * kSwizzledRowBytes;
  return static_cast<uint64_t>((shared_address & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(tile_bytes >> 4) << 16 | (kEightRows >> 4) << 32 | uint64_t{1} << 62;
}

#define FATHOM_SIXTEEN(d, i)                                                                  \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9]), "+f"(d[i + 10]),        \
      "+f"(d[i + 11]), "+f"(d[i + 12]), "+f"(d[i + 13]), "+f"(d[i + 14]), "+f"(d[i + 15])
#define FATHOM_SIXTY_FOUR(d) \
  FATHOM_SIXTEEN(d, 0), FATHOM_SIXTEEN(d, 16), FATHOM_SIXTEEN(d, 32), FATHOM_SIXTEEN(d, 48)
#define FATHOM_PRODUCT_N128                                          \
  "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "           \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"          \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "

// A from shared memory.
template <OperandB kOperandB>
__device__ inline void ProductBf16N128(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n" FATHOM_PRODUCT_N128
               "%64, %65, p, 1, 1, 0, %67;\n}"
               : FATHOM_SIXTY_FOUR(d)
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)),
                 "n"(kOperandB == OperandB::kTransposed ? 1 : 0));
}

// A from registers: columns 2(l % 4) + {0, 1} of row 16w + l/4 in a[0], of row + 8 in a[1]; columns
// + 8 likewise in a[2] and a[3].
template <OperandB kOperandB>
__device__ inline void ProductBf16N128(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                       bool accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n" FATHOM_PRODUCT_N128
               "{%64,%65,%66,%67}, %68, p, 1, 1, %70;\n}"
               : FATHOM_SIXTY_FOUR(d)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),
                 "r"(static_cast<int>(accumulate)),
                 "n"(kOperandB == OperandB::kTransposed ? 1 : 0));
}

// D[64, 256] += A[64, 16] · B[256, 16]ᵀ, both from shared memory, B as stored.
__device__ inline void ProductBf16N256(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
      "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
      "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
      "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
      "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, "
      "%128, %129, p, 1, 1, 0, 0;\n}"
      : FATHOM_SIXTY_FOUR(d), FATHOM_SIXTEEN(d, 64), FATHOM_SIXTEEN(d, 80), FATHOM_SIXTEEN(d, 96),
        FATHOM_SIXTEEN(d, 112)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

#undef FATHOM_PRODUCT_N128
#undef FATHOM_SIXTY_FOUR
#undef FATHOM_SIXTEEN

// Four 8×8 matrices of 16-bit elements, one per eight lanes, each of which gives the address of one
// row of 16 bytes. Of every matrix lane l holds columns 2(l % 4) + {0, 1} of row l / 4, or of the
// transposed one.
enum class Matrix { kAsStored, kTransposed };
template <Matrix kMatrix>
__device__ inline void LoadMatrices(uint32_t row_address, uint32_t (&words)[4]) {
  if constexpr (kMatrix == Matrix::kAsStored) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(row_address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(row_address)
                 : "memory");
  }
}
__device__ inline void StoreMatricesTransposed(uint32_t row_address, const uint32_t (&words)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row_address),
      "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
      : "memory");
}

// One box from a tile in shared memory; in order of the thread's commits.
__device__ inline void StoreBox(const void* source, const CUtensorMap* map, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(SharedAddress(source)), "r"(column), "r"(row)
      : "memory");
}
__device__ inline void StoresCommit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// The thread's stores have left shared memory; have arrived.
__device__ inline void StoresWaitRead() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ inline void StoresWait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// All threads of the cluster, as ClusterSync, where no memory is shared but barriers that
// BarrierInitFence has made known, or none: that one waits for all of a thread's stores.
__device__ inline void ClusterSyncBare() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::
                   : "memory");
}

// Arrives at a named barrier that others wait at with SyncThreads.
__device__ inline void ArriveThreads(int name, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(num_threads) : "memory");
}

// Two neighbouring columns, rounded.
__device__ inline uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 packed = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &packed, sizeof bits);
  return bits;
}

// Among the four lanes that hold one row of accumulators: lane i gets the i-th word of each, in the
// order of the lanes.
__device__ inline void TransposeQuad(uint32_t (&words)[4], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(~0u, odd ? words[i] : words[i + 1], 1);
    words[i] = odd ? got : words[i];
    words[i + 1] = odd ? words[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(~0u, upper ? words[i] : words[i + 2], 2);
    words[i] = upper ? got : words[i];
    words[i + 2] = upper ? words[i + 2] : got;
  }
}

}  // namespace fathom::sm90
