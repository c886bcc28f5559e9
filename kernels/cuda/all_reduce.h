// Sums over the ranks of one host through memory that their GPUs share, as kernels that never wait
// for a host: they can be recorded in graphs.
//
// Every rank owns a window, which all others map. Small sums are one-shot: each rank sends its part
// to all, in packets that carry their own flags, and sums what it received. Large ones are
// two-shot: each unit of the tensor has an owner, which sums what the others send it and sends the
// sum to all. Sums are made in rank order, in F32, rounded once: the same bits on every rank and in
// both ways.
//
// Calls are counted in device memory, by every launch; the count is what flags hold, and picks one
// of two sets of packets. A call ends on no rank before it has begun on all. So who begins call n +
// 2 knows that everybody is done with call n, whose packets it overwrites. Where ranks meet twice
// in a call, in the two-shot sum and in gathering, one place for what is sent is enough.
//
// A wait ends when the host says so (PeerControl::abort) or after timeout_ns. The kernel then
// writes PeerControl::fault and ends without a result, and all later ones do nothing: the host must
// look.
//
// The ranks' kernels wait for each other, so all their blocks must fit on the GPUs at once. They
// are few, and ranks that share a GPU let nothing else onto it while they wait.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/tensor.h"

namespace fathom::cuda {

inline constexpr int kMostPeers = 8;

// Host memory that the GPU reads and writes.
struct PeerControl {
  static constexpr uint32_t kAborted = 1;
  static constexpr uint32_t kTimedOut = 2;  // + the rank that was waited for

  volatile uint32_t abort = 0;  // set by the host; not 0: end all waiting
  volatile uint32_t fault = 0;  // set by the GPU, once: kAborted, or kTimedOut + rank
};

// The ranks as one of them sees them.
struct PeerGroup {
  int rank = 0;
  int world_size = 1;              // at most kMostPeers
  char* windows[kMostPeers] = {};  // by rank, kPeerWindowBytes each; as this GPU reaches them
  PeerControl* control = nullptr;
  int64_t timeout_ns = 0;
  bool shares_gpu = false;  // some two ranks run on the same GPU; equal on all ranks
};

// Zeros before the first call of a group; the same on all ranks.
inline constexpr int64_t kPeerWindowBytes = (int64_t{20} << 20) + (64 << 10);

// data = Σ over ranks, in place.   data: count elements, kF32 or kBF16
void AllReduceSum(const PeerGroup& group, void* data, DType dtype, int64_t count,
                  cudaStream_t stream);

// residual += Σ over ranks of partial (rounded to act), then its norm, as Ops::AddRmsNorm: in one
// kernel for what is summed in one shot, where launches and meetings are most of the time. (For
// more rows the sum and then a norm that has the whole GPU are quicker.)
//   partial [T, N] act, holds anything afterwards   residual [T, N] act   weight [N] f32 or bf16
//   normed [T, N] act, or absent   values [T, N] F8_E4M3 and scales [T, ⌈N/128⌉] f32, or both
//   absent
// Rows may be strided. REQUIRES: CanAllReduceAddRmsNorm
struct PeerAddRmsNorm {
  Tensor partial = {}, residual = {}, weight = {};
  float eps = 0.0f;
  Tensor normed = {}, values = {}, scales = {};
};
bool CanAllReduceAddRmsNorm(const PeerGroup& group, DType dtype, int64_t rows, int64_t columns);
void AllReduceAddRmsNorm(const PeerGroup& group, const PeerAddRmsNorm& task, cudaStream_t stream);

// whole[r] = part of rank r, at rank 0 only.
//   part: num_bytes on every rank   whole: world_size * num_bytes, or null on other ranks
void GatherToRank0(const PeerGroup& group, const void* part, int64_t num_bytes, void* whole,
                   cudaStream_t stream);

// Loads the kernels now: loading one later would wait for others that wait for it.
void LoadPeerKernels();

}  // namespace fathom::cuda
