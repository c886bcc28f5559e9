#include "kernels/cuda/cuda_peer_memory.h"

#include <sys/random.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <new>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/check.h"
#include "base/human_bytes.h"
#include "base/status_macros.h"
#include "kernels/cuda/all_reduce.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/shape_checks.h"

namespace fathom {
namespace {

static_assert(kMostPeerRanks == cuda::kMostPeers);

// What a handle's bytes are. Every rank runs the same version of this program.
struct Handle {
  std::array<char, 16> process;  // random, of each process
  std::array<char, 16> gpu;      // its UUID
  char* data;                    // within that process
  cudaIpcMemHandle_t memory;
};

// After fork a child is another process, but has no use for the GPU of its parent anyway.
const std::array<char, 16>& ThisProcess() {
  static const std::array<char, 16> token = [] {
    std::array<char, 16> bytes;
    CHECK_EQ(getrandom(bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
    return bytes;
  }();
  return token;
}

std::string GpuName(const std::array<char, 16>& uuid) {
  return absl::StrCat("GPU-", absl::BytesToHexString(absl::string_view(uuid.data(), 4)), "-…");
}

class CudaPeerMemory final : public PeerMemory {
 public:
  CudaPeerMemory(const PeerMemoryOptions& options, char* window, cudaStream_t stream)
      : stream_(stream) {
    void* control = nullptr;
    CUDA_CHECK(cudaHostAlloc(&control, sizeof(cuda::PeerControl), cudaHostAllocMapped));
    group_.rank = options.rank;
    group_.world_size = options.world_size;
    group_.windows[options.rank] = window;
    group_.control = new (control) cuda::PeerControl();
    group_.timeout_ns = absl::ToInt64Nanoseconds(options.timeout);
    cuda::LoadPeerKernels();
  }

  ~CudaPeerMemory() override {
    Abort();
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    for (void* mapped : mapped_) {
      // Fails when the process whose memory it was has ended; there is nothing left to unmap then.
      if (cudaIpcCloseMemHandle(mapped) != cudaSuccess) cudaGetLastError();
    }
    CUDA_CHECK(cudaFreeHost(group_.control));
  }

  std::string handle() const override {
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    Handle handle = {.process = ThisProcess(), .gpu = {}, .data = own_window(), .memory = {}};
    int device = 0;
    cudaDeviceProp properties;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    std::memcpy(handle.gpu.data(), &properties.uuid, handle.gpu.size());
    CUDA_CHECK(cudaIpcGetMemHandle(&handle.memory, own_window()));
    return std::string(reinterpret_cast<const char*>(&handle), sizeof handle);
  }

  absl::Status Connect(const std::vector<std::string>& handles) override {
    CHECK_EQ(static_cast<int>(handles.size()), group_.world_size);
    std::vector<Handle> ranks(handles.size());
    for (int rank = 0; rank < group_.world_size; ++rank) {
      if (handles[rank].size() != sizeof(Handle)) {
        return absl::FailedPreconditionError(absl::StrCat(
            "rank ", rank, " described its GPU memory in ", handles[rank].size(),
            " bytes, expected ", sizeof(Handle), ": do all workers have the same version?"));
      }
      std::memcpy(&ranks[rank], handles[rank].data(), sizeof(Handle));
      if (rank != group_.rank) RETURN_IF_ERROR(Map(rank, ranks[rank]));
      for (int other = 0; other < rank; ++other) {
        if (ranks[other].gpu == ranks[rank].gpu) group_.shares_gpu = true;
      }
    }
    // No rank writes to this one any more, nor yet.
    CUDA_CHECK(cudaMemsetAsync(own_window(), 0, cuda::kPeerWindowBytes, stream_));
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    return absl::OkStatus();
  }

  void AllReduceSum(const Tensor& tensor) override {
    CHECK(tensor.dense()) << tensor.DebugString();
    cuda::AllReduceSum(group_, tensor.raw(), tensor.dtype(), tensor.num_elements(), stream_);
  }

  void GatherToRank0(const Tensor& part, const Tensor& whole) override {
    CHECK(part.dense()) << part.DebugString();
    if (group_.rank == 0) {
      CHECK(whole.dense()) << whole.DebugString();
      CHECK_EQ(whole.num_bytes(), part.num_bytes() * group_.world_size);
    }
    cuda::GatherToRank0(group_, part.raw(), part.num_bytes(), whole.raw(), stream_);
  }

  bool AllReduceAddRmsNorm(const Tensor& partial, const Tensor& residual, const Tensor& weight,
                           float eps, const Tensor& normed, const Tensor& values,
                           const Tensor& scales) override {
    CheckAddRmsNorm(residual, partial, weight, normed, LinearInput(values, scales));
    if (!cuda::CanAllReduceAddRmsNorm(group_, partial.dtype(), partial.dim(0), partial.dim(1))) {
      return false;
    }
    cuda::AllReduceAddRmsNorm(group_,
                              {.partial = partial,
                               .residual = residual,
                               .weight = weight,
                               .eps = eps,
                               .normed = normed,
                               .values = values,
                               .scales = scales},
                              stream_);
    return true;
  }

  void Abort() override { group_.control->abort = 1; }

  PeerFault fault() const override {
    const uint32_t fault = group_.control->fault;
    if (fault == 0) return {};
    if (fault == cuda::PeerControl::kAborted) return {.kind = PeerFault::Kind::kAborted};
    return {.kind = PeerFault::Kind::kTimedOut,
            .silent_rank = static_cast<int>(fault - cuda::PeerControl::kTimedOut)};
  }

 private:
  char* own_window() const { return group_.windows[group_.rank]; }

  absl::Status Map(int rank, const Handle& handle) {
    if (handle.process == ThisProcess()) {
      group_.windows[rank] = handle.data;
      return absl::OkStatus();
    }
    void* mapped = nullptr;
    const cudaError_t error =
        cudaIpcOpenMemHandle(&mapped, handle.memory, cudaIpcMemLazyEnablePeerAccess);
    if (error != cudaSuccess) {
      cudaGetLastError();  // forgets it
      return absl::FailedPreconditionError(
          absl::StrCat("the memory of rank ", rank, " on ", GpuName(handle.gpu),
                       " cannot be mapped by rank ", group_.rank, ": ", cudaGetErrorString(error),
                       "; where GPUs do not see each other, --collectives must be nccl or shm"));
    }
    mapped_.push_back(mapped);
    group_.windows[rank] = static_cast<char*>(mapped);
    return absl::OkStatus();
  }

  const cudaStream_t stream_;
  cuda::PeerGroup group_;
  std::vector<void*> mapped_;
};

}  // namespace

PeerWindow::~PeerWindow() {
  if (data_ != nullptr) CUDA_CHECK(cudaFree(data_));
}

absl::StatusOr<char*> PeerWindow::Get() {
  if (data_ == nullptr) {
    void* data = nullptr;
    const cudaError_t error = cudaMalloc(&data, cuda::kPeerWindowBytes);
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // forgets it
      return absl::ResourceExhaustedError(absl::StrCat(
          "no room for ", HumanBytes(cuda::kPeerWindowBytes),
          " of GPU memory that the ranks share: try decreasing --gpu-memory-utilization"));
    }
    CUDA_CHECK(error);
    data_ = static_cast<char*>(data);
  }
  return data_;
}

absl::StatusOr<std::unique_ptr<PeerMemory>> OpenCudaPeerMemory(const PeerMemoryOptions& options,
                                                               PeerWindow& window,
                                                               cudaStream_t stream) {
  CHECK(options.rank >= 0 && options.rank < options.world_size);
  if (options.world_size > kMostPeerRanks) {
    return absl::InvalidArgumentError(absl::StrCat("--collectives peer is for up to ",
                                                   kMostPeerRanks, " ranks, not ",
                                                   options.world_size, ": expected nccl, or shm"));
  }
  ASSIGN_OR_RETURN(char* const data, window.Get());
  return std::make_unique<CudaPeerMemory>(options, data, stream);
}

}  // namespace fathom
