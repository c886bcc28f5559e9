// One device: its memory and the operations on it. The CPU is a device like any other.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "kernels/peer_memory.h"
#include "kernels/tensor.h"

namespace fathom {

class Ops;

// Owns device memory, 64-byte aligned, zero-filled when new. Move-only.
class Buffer {
 public:
  Buffer() = default;
  Buffer(void* data, int64_t num_bytes, void (*release)(void*, int64_t))
      : data_(data), num_bytes_(num_bytes), release_(release) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(num_bytes_, other.num_bytes_);
    std::swap(release_, other.release_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) release_(data_, num_bytes_);
  }

  void* data() const { return data_; }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  void* data_ = nullptr;
  int64_t num_bytes_ = 0;
  void (*release_)(void*, int64_t) = nullptr;
};

// Operations that were queued once and can be queued again, all at once and with the same
// arguments: tensors at the same addresses, in which there may be other numbers. The memory of
// these tensors, and the device, must outlive it. Not thread-safe.
class Recording {
 public:
  virtual ~Recording() = default;
  virtual void Replay() = 0;
};

struct DeviceOptions {
  int num_threads = 1;  // CPU: threads that share each operation
  // CUDA: which one of those that CUDA_VISIBLE_DEVICES shows, or, where that is absent, of all as
  // nvidia-smi counts them. One per process.
  int gpu = 0;
  std::optional<std::string> cuda_visible_devices = std::nullopt;
};

// Not thread-safe: one thread drives a device.
class Device {
 public:
  virtual ~Device() = default;

  virtual std::string name() const = 0;  // cpu, cuda
  virtual Ops& ops() = 0;
  // Whether the device's memory is the host's, so that neither side needs a copy to read it.
  virtual bool shares_host_memory() const = 0;

  // ResourceExhausted when there is no room; names the number of bytes.
  virtual absl::StatusOr<Buffer> Allocate(int64_t num_bytes) = 0;
  // Bytes that could be allocated now, and those that there are at all.
  virtual int64_t AvailableBytes() const = 0;
  virtual int64_t TotalBytes() const { return AvailableBytes(); }

  // Copies take their turn among the operations. On return `host` may be changed or read.
  // `host` is dense; of a tensor only the first dimension may have gaps on a GPU.
  virtual void CopyFromHost(const void* host, const Tensor& tensor) = 0;
  virtual void CopyToHost(const Tensor& tensor, void* host) = 0;
  // A copy that does not wait, for loading: from memory that the device reads at full speed
  // (page-locked for a GPU, on the CPU any), which must stay as it is until AwaitCopy has returned
  // for the copy's number or a later one. ResourceExhausted when there is no such memory.
  virtual absl::StatusOr<Buffer> AllocateStaging(int64_t num_bytes);
  virtual int64_t QueueCopy(const void* staging, const Tensor& tensor);
  virtual void AwaitCopy(int64_t copy);
  // Between tensors of this device, of equal size; `from` is dense.
  virtual void Copy(const Tensor& from, const Tensor& to) = 0;

  // Calls `queue_work` and records the operations and copies that it queues instead of running
  // them: it must neither allocate nor wait nor copy from or to the host. Its error is returned.
  // Null, and `queue_work` is not called, where there is nothing to be won, as on the CPU.
  virtual absl::StatusOr<std::unique_ptr<Recording>> Record(
      absl::FunctionRef<absl::Status()> /*queue_work*/) {
    return nullptr;
  }

  // Collectives with other devices of this host; at most one at a time. Unimplemented where there
  // are none. The device must outlive it.
  virtual absl::StatusOr<std::unique_ptr<PeerMemory>> OpenPeerMemory(
      const PeerMemoryOptions& /*options*/) {
    return absl::UnimplementedError(
        absl::StrCat("devices of kind ", name(), " have no peer memory"));
  }
  // What the operations are queued on, for libraries that queue more: a cudaStream_t, or null.
  virtual void* stream() const { return nullptr; }
};

absl::StatusOr<std::unique_ptr<Device>> OpenCpuDevice(const DeviceOptions& options);
// Unavailable, saying how many GPUs there are, when there is none of that number; and in a build
// without CUDA (cuda/unavailable.cc).
absl::StatusOr<std::unique_ptr<Device>> OpenCudaDevice(const DeviceOptions& options);

}  // namespace fathom
