// A rank's window as device code sees it: where what stands, how ranks meet, and how a wait ends.
// all_reduce.h says what it is for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "kernels/cuda/all_reduce.h"
#include "kernels/cuda/dependent_launch.cuh"

namespace fathom::cuda {

inline constexpr int kMostBlocks = 64;
inline constexpr int kMostBlocksSharing =
    16;  // of each of up to eight ranks on one GPU, side by side

// --- a window
//
//   PeerState                       of its owner alone
//   flags [2][kMostBlocks][kMostPeers]  u32: the call in which that block of that rank came here,
//                                   for the first and the second time
//   packets [2][world_size]         by the call's parity and the sender
//   parts, sums                     two-shot: [world_size][owned units], and [units]; gathering:
//                                   the parts of rank 0. Two places, since the next call's parts
//                                   come while this one's sums are still read
inline constexpr int64_t kFlagsOffset = 4096;
inline constexpr int64_t kPacketsOffset = 64 << 10;
inline constexpr int64_t kPacketsBytes = 2 << 20;  // of one parity
inline constexpr int64_t kPartsOffset = kPacketsOffset + 2 * kPacketsBytes;
inline constexpr int64_t kStagingBytes = 8 << 20;  // of parts, and of sums
inline constexpr int64_t kSumsOffset = kPartsOffset + kStagingBytes;
static_assert(kSumsOffset + kStagingBytes == kPeerWindowBytes);
static_assert(kFlagsOffset + 2 * kMostBlocks * kMostPeers * 4 <= kPacketsOffset);

struct PeerState {
  uint32_t num_calls;
  uint32_t num_blocks_done;  // of the call under way
  uint32_t fault;            // 0: none
};

__device__ inline PeerState& StateOf(const PeerGroup& group) {
  return *reinterpret_cast<PeerState*>(group.windows[group.rank]);
}
__device__ inline uint32_t* Flag(char* window, int meeting, int block, int rank) {
  return reinterpret_cast<uint32_t*>(window + kFlagsOffset) +
         (meeting * kMostBlocks + block) * kMostPeers + rank;
}

// --- memory that other GPUs write

__device__ inline void StoreRelease(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ inline uint32_t LoadAcquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
__device__ inline uint64_t Nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Eight bytes of data, each half beside a flag. The halves are written and read as one each, so a
// half with the right flag has the right data, whatever the order in which memory sees them.
struct Packet {
  uint64_t halves[2];

  __device__ static Packet Of(const uint32_t* words, uint32_t flag) {
    return {{words[0] | uint64_t{flag} << 32, words[1] | uint64_t{flag} << 32}};
  }
  __device__ bool Has(uint32_t flag) const {
    return static_cast<uint32_t>(halves[0] >> 32) == flag &&
           static_cast<uint32_t>(halves[1] >> 32) == flag;
  }
  __device__ void Unpack(uint32_t* words) const {
    words[0] = static_cast<uint32_t>(halves[0]);
    words[1] = static_cast<uint32_t>(halves[1]);
  }
};
__device__ inline void StorePacket(Packet* to, const Packet& packet) {
  asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(to), "l"(packet.halves[0]),
               "l"(packet.halves[1])
               : "memory");
}
__device__ inline Packet LoadPacket(const Packet* from) {
  Packet packet;
  asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];"
               : "=l"(packet.halves[0]), "=l"(packet.halves[1])
               : "l"(from)
               : "memory");
  return packet;
}

// --- calls

// Number of the call that begins, the same on all ranks; never 0, which is what new memory holds.
// Parities alternate also where the count wraps. (A packet that was not overwritten for 2³² calls
// would then be taken for new: some 20 hours of decoding, to the call.)
__device__ inline uint32_t BeginCall(const PeerGroup& group) {
  WaitForPredecessors();
  if (!group.shares_gpu) LetDependentsLaunch();
  const uint32_t call = __ldcg(&StateOf(group).num_calls) + 1;
  return call == 0 ? 2 : call;
}

__device__ inline void EndCall(const PeerGroup& group, uint32_t call) {
  if (group.shares_gpu) LetDependentsLaunch();
  __syncthreads();
  if (threadIdx.x != 0) return;
  PeerState& state = StateOf(group);
  if (atomicAdd(&state.num_blocks_done, 1) != gridDim.x - 1) return;
  state.num_blocks_done = 0;
  state.num_calls = call;
}

// One thread's waiting within a call.
class Patience {
 public:
  __device__ explicit Patience(const PeerGroup& group)
      : group_(group), gave_up_(*const_cast<volatile uint32_t*>(&StateOf(group).fault) != 0) {}

  __device__ bool gave_up() const { return gave_up_; }

  // After having looked in vain for what `peer` sends. Looks at the clock and the host now and
  // then.
  __device__ bool GiveUp(int peer) {
    constexpr uint32_t kLooks = 256;  // a look takes about a microsecond
    if (gave_up_ || ++num_looks_ % kLooks != 0) return gave_up_;
    const uint64_t now = Nanoseconds();
    if (since_ == 0) since_ = now;
    const bool is_aborted = group_.control->abort != 0;
    if (is_aborted || now - since_ > static_cast<uint64_t>(group_.timeout_ns)) {
      const uint32_t fault =
          is_aborted ? PeerControl::kAborted : PeerControl::kTimedOut + static_cast<uint32_t>(peer);
      gave_up_ = true;
      if (atomicCAS(&StateOf(group_).fault, 0u, fault) == 0) group_.control->fault = fault;
      __threadfence_system();
    } else {
      gave_up_ = *const_cast<volatile uint32_t*>(&StateOf(group_).fault) != 0;
    }
    return gave_up_;
  }

  // Waits for a flag of this rank's window. It counts upwards and may be ahead.
  __device__ void Await(int meeting, int block, int peer, uint32_t call) {
    const uint32_t* flag = Flag(group_.windows[group_.rank], meeting, block, peer);
    while (!gave_up_ && static_cast<int32_t>(LoadAcquire(flag) - call) < 0) GiveUp(peer);
  }

 private:
  const PeerGroup& group_;
  bool gave_up_;
  uint32_t num_looks_ = 0;
  uint64_t since_ = 0;
};

// Tells the ranks in `first`, `first` + 1, … before `end` that this block has come to a meeting:
// they see what its threads wrote. Every thread calls it.
__device__ inline void Announce(const PeerGroup& group, int meeting, int first, int end,
                                uint32_t call) {
  __syncthreads();
  const int peer = first + static_cast<int>(threadIdx.x);
  if (peer < end) StoreRelease(Flag(group.windows[peer], meeting, blockIdx.x, group.rank), call);
}
// Waits until the block of this number on the ranks in [first, end) has come; whether all have.
__device__ inline bool Meet(const PeerGroup& group, Patience& patience, int meeting, int first,
                            int end, uint32_t call) {
  const int peer = first + static_cast<int>(threadIdx.x);
  if (peer < end) patience.Await(meeting, blockIdx.x, peer, call);
  return __syncthreads_or(peer < end && patience.gave_up()) == 0;
}

// --- elements

// `kCount` neighbouring elements, packed; those past the end are zero and not written.
template <typename Element, int kCount>
struct alignas(kCount * sizeof(Element)) Vector {
  static constexpr int kBits = 8 * sizeof(Element);
  static constexpr int kPerWord = 32 / kBits;
  uint32_t words[kCount / kPerWord];

  __device__ static Vector Load(const Element* from, int64_t num_valid) {
    if (num_valid >= kCount && reinterpret_cast<uintptr_t>(from) % sizeof(Vector) == 0) {
      return *reinterpret_cast<const Vector*>(from);
    }
    Vector vector;
#pragma unroll
    for (uint32_t& word : vector.words) word = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i >= num_valid) continue;
      uint32_t bits = 0;
      memcpy(&bits, from + i, sizeof(Element));
      vector.words[i / kPerWord] |= bits << i % kPerWord * kBits;
    }
    return vector;
  }
  __device__ void Store(Element* to, int64_t num_valid) const {
    if (num_valid >= kCount && reinterpret_cast<uintptr_t>(to) % sizeof(Vector) == 0) {
      *reinterpret_cast<Vector*>(to) = *this;
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t bits = words[i / kPerWord] >> i % kPerWord * kBits;
      if (i < num_valid) memcpy(to + i, &bits, sizeof(Element));
    }
  }

  // Of float and bf16.
  __device__ float operator[](int i) const {
    if constexpr (kBits == 32) {
      return __uint_as_float(words[i]);
    } else {
      return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xFFFF0000u);
    }
  }
  // Rounded to nearest, ties to even.
  __device__ static Vector Of(const float (&values)[kCount]) {
    Vector vector;
#pragma unroll
    for (int i = 0; i < kCount; i += kPerWord) {
      if constexpr (kBits == 32) {
        vector.words[i] = __float_as_uint(values[i]);
      } else {
        const __nv_bfloat162 two = __floats2bfloat162_rn(values[i], values[i + 1]);
        memcpy(&vector.words[i / 2], &two, sizeof two);
      }
    }
    return vector;
  }
};

}  // namespace fathom::cuda
