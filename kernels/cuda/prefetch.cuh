// Fetching weights into the L2 with the multiprocessors that a small kernel leaves idle.
//
// Ops::Prefetch only notes a weight. The next kernel that leaves room carries the note: it gets
// more blocks than its own work needs, and those ask for the weight and end. Nothing waits for
// them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/dependent_launch.cuh"

namespace fathom::cuda {

inline constexpr int kMostPrefetches = 4;
inline constexpr int kPrefetchBlocks = 24;
inline constexpr int64_t kMostPrefetchBytes = int64_t{24} << 20;  // half of the L2

// Pieces of device memory, 16-byte aligned, sizes multiples of 16.
struct PrefetchList {
  const char* data[kMostPrefetches] = {};
  int64_t num_bytes[kMostPrefetches] = {};
  int count = 0;

  int blocks() const { return count > 0 ? kPrefetchBlocks : 0; }
};

#ifdef __CUDACC__
// The work of block `block` of kPrefetchBlocks.
__device__ inline void Prefetch(const PrefetchList& list, int block) {
  constexpr int64_t kPiece = 16 << 10;
  const int64_t first = int64_t{block} + int64_t{threadIdx.x} * kPrefetchBlocks;
#pragma unroll
  for (int i = 0; i < kMostPrefetches; ++i) {  // what is not there has no bytes
    for (int64_t at = first * kPiece; at < list.num_bytes[i];
         at += int64_t{kPrefetchBlocks} * blockDim.x * kPiece) {
      const int64_t left = list.num_bytes[i] - at;
      const auto bytes = static_cast<uint32_t>(left < kPiece ? left : kPiece);
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(list.data[i] + at), "r"(bytes)
                   : "memory");
    }
  }
}
#endif

}  // namespace fathom::cuda
