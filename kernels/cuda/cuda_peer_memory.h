// Peer memory of GPUs: windows that the processes of a host map through CUDA's IPC handles, or find
// at the same address where several ranks are threads of one process.
//
// Thread-safety as of PeerMemory.
#pragma once

#include <cuda_runtime.h>

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/peer_memory.h"

namespace fathom {

// The memory that others map. It outlives the groups: a rank that leaves late must not write to
// memory that has become something else.
class PeerWindow {
 public:
  PeerWindow() = default;
  PeerWindow(const PeerWindow&) = delete;
  PeerWindow& operator=(const PeerWindow&) = delete;
  ~PeerWindow();

  // Allocated at the first call; ResourceExhausted when the GPU is full.
  absl::StatusOr<char*> Get();

 private:
  char* data_ = nullptr;
};

// Collectives are queued on `stream`; it and `window` must outlive them.
absl::StatusOr<std::unique_ptr<PeerMemory>> OpenCudaPeerMemory(const PeerMemoryOptions& options,
                                                               PeerWindow& window,
                                                               cudaStream_t stream);

}  // namespace fathom
