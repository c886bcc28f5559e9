#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/cuda_peer_memory.h"
#include "kernels/cuda/gpu_choice.h"
#include "kernels/device.h"

namespace fathom {
namespace {

// Hopper, for which kernels are compiled as machine code, and what runs those of compute_100.
bool IsSupported(const cudaDeviceProp& device) {
  return (device.major == 9 && device.minor == 0) || device.major >= 10;
}

void Free(void* data, int64_t) { CUDA_CHECK(cudaFree(data)); }

// A queue of work, and host memory that its copies read from after CopyFromHost has returned.
class CudaStream {
 public:
  CudaStream() {
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    CUDA_CHECK(cudaMallocHost(&staging_, kStagingBytes));
  }
  CudaStream(const CudaStream&) = delete;
  CudaStream& operator=(const CudaStream&) = delete;
  ~CudaStream() {
    Synchronize();
    CUDA_CHECK(cudaFreeHost(staging_));
    CUDA_CHECK(cudaStreamDestroy(stream_));
  }

  cudaStream_t get() const { return stream_; }
  void Synchronize() {
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    staged_bytes_ = 0;  // nothing reads the staging memory
  }

  void CopyFromHost(const char* host, char* device, int64_t num_bytes) {
    constexpr int64_t kAlignment = 256;
    while (num_bytes > 0) {
      const int64_t part = std::min(num_bytes, kStagingBytes / 2);
      if (staged_bytes_ + part > kStagingBytes) Synchronize();
      char* staged = static_cast<char*>(staging_) + staged_bytes_;
      std::memcpy(staged, host, static_cast<size_t>(part));
      CUDA_CHECK(cudaMemcpyAsync(device, staged, static_cast<size_t>(part), cudaMemcpyHostToDevice,
                                 stream_));
      staged_bytes_ += (part + kAlignment - 1) / kAlignment * kAlignment;
      host += part;
      device += part;
      num_bytes -= part;
    }
  }

 private:
  static constexpr int64_t kStagingBytes = int64_t{16} << 20;

  cudaStream_t stream_ = nullptr;
  void* staging_ = nullptr;
  int64_t staged_bytes_ = 0;  // since the stream was last known to be empty
};

// A tensor as rows of contiguous bytes that lie at equal distances.
struct Pitched {
  char* data = nullptr;
  size_t row_bytes = 0, pitch_bytes = 0, num_rows = 0;
};

Pitched PitchedOf(const Tensor& tensor) {
  if (tensor.dense()) {
    const auto num_bytes = static_cast<size_t>(tensor.num_bytes());
    return {static_cast<char*>(tensor.raw()), num_bytes, num_bytes, 1};
  }
  CHECK(tensor.rank() >= 2 && tensor[0].dense()) << tensor.DebugString();
  return {static_cast<char*>(tensor.raw()), static_cast<size_t>(tensor[0].num_bytes()),
          static_cast<size_t>(tensor.stride(0) * SizeOf(tensor.dtype())),
          static_cast<size_t>(tensor.dim(0))};
}

// Points in a stream, numbered from 1.
class StreamMarks {
 public:
  StreamMarks() {
    for (cudaEvent_t& event : events_) {
      CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    }
  }
  StreamMarks(const StreamMarks&) = delete;
  StreamMarks& operator=(const StreamMarks&) = delete;
  ~StreamMarks() {
    for (const cudaEvent_t event : events_) CUDA_CHECK(cudaEventDestroy(event));
  }

  int64_t Mark(cudaStream_t stream) {
    ++last_;
    CUDA_CHECK(cudaEventRecord(events_[last_ % kEvents], stream));
    return last_;
  }
  // An old event was taken for a later mark since: then this waits for that one.
  void Await(int64_t mark) { CUDA_CHECK(cudaEventSynchronize(events_[mark % kEvents])); }

 private:
  static constexpr int64_t kEvents = 64;

  int64_t last_ = 0;
  cudaEvent_t events_[kEvents];
};

class CudaRecording final : public Recording {
 public:
  // Takes the graph.
  CudaRecording(cudaGraph_t graph, cudaStream_t stream) : stream_(stream) {
    CUDA_CHECK(cudaGraphInstantiate(&executable_, graph, 0));
    CUDA_CHECK(cudaGraphDestroy(graph));
    CUDA_CHECK(cudaGraphUpload(executable_, stream_));
  }
  CudaRecording(const CudaRecording&) = delete;
  CudaRecording& operator=(const CudaRecording&) = delete;
  ~CudaRecording() override { CUDA_CHECK(cudaGraphExecDestroy(executable_)); }

  void Replay() override { CUDA_CHECK(cudaGraphLaunch(executable_, stream_)); }

 private:
  const cudaStream_t stream_;
  cudaGraphExec_t executable_ = nullptr;
};

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(const cudaDeviceProp& device) : ops_(device, stream_.get()) {}

  std::string name() const override { return "cuda"; }
  Ops& ops() override { return ops_; }
  bool shares_host_memory() const override { return false; }

  absl::StatusOr<Buffer> Allocate(int64_t num_bytes) override {
    CHECK_GE(num_bytes, 0);
    if (num_bytes == 0) return Buffer();
    void* data = nullptr;
    if (cudaMalloc(&data, static_cast<size_t>(num_bytes)) == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // forgets it
      return absl::ResourceExhaustedError(absl::StrCat("no room for ", num_bytes,
                                                       " bytes of GPU memory; ", AvailableBytes(),
                                                       " bytes are available"));
    }
    CUDA_CHECK(cudaGetLastError());
    CUDA_CHECK(cudaMemsetAsync(data, 0, static_cast<size_t>(num_bytes), stream_.get()));
    return Buffer(data, num_bytes, Free);
  }

  int64_t AvailableBytes() const override {
    size_t free_bytes = 0, total_bytes = 0;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    return static_cast<int64_t>(free_bytes);
  }

  int64_t TotalBytes() const override {
    size_t free_bytes = 0, total_bytes = 0;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    return static_cast<int64_t>(total_bytes);
  }

  void CopyFromHost(const void* host, const Tensor& tensor) override {
    if (tensor.num_elements() == 0) return;
    const Pitched rows = PitchedOf(tensor);
    for (size_t i = 0; i < rows.num_rows; ++i) {
      stream_.CopyFromHost(static_cast<const char*>(host) + i * rows.row_bytes,
                           rows.data + i * rows.pitch_bytes, static_cast<int64_t>(rows.row_bytes));
    }
  }

  absl::StatusOr<Buffer> AllocateStaging(int64_t num_bytes) override {
    void* data = nullptr;
    if (cudaMallocHost(&data, static_cast<size_t>(num_bytes)) != cudaSuccess) {
      cudaGetLastError();  // forgets it
      return absl::ResourceExhaustedError(
          absl::StrCat("no room for ", num_bytes, " bytes of page-locked host memory"));
    }
    return Buffer(data, num_bytes,
                  [](void* released, int64_t) { CUDA_CHECK(cudaFreeHost(released)); });
  }

  int64_t QueueCopy(const void* staging, const Tensor& tensor) override {
    if (tensor.num_elements() > 0) {
      const Pitched rows = PitchedOf(tensor);
      CUDA_CHECK(cudaMemcpy2DAsync(rows.data, rows.pitch_bytes, staging, rows.row_bytes,
                                   rows.row_bytes, rows.num_rows, cudaMemcpyHostToDevice,
                                   stream_.get()));
    }
    return copies_.Mark(stream_.get());
  }

  void AwaitCopy(int64_t copy) override { copies_.Await(copy); }

  void CopyToHost(const Tensor& tensor, void* host) override {
    if (tensor.num_elements() == 0) return;
    const Pitched rows = PitchedOf(tensor);
    CUDA_CHECK(cudaMemcpy2DAsync(host, rows.row_bytes, rows.data, rows.pitch_bytes, rows.row_bytes,
                                 rows.num_rows, cudaMemcpyDeviceToHost, stream_.get()));
    stream_.Synchronize();
  }

  void Copy(const Tensor& from, const Tensor& to) override {
    CHECK(from.dense()) << from.DebugString();
    CHECK_EQ(from.num_bytes(), to.num_bytes());
    if (to.num_elements() == 0) return;
    if (to.dense()) {  // a third faster than as one row of many
      CUDA_CHECK(cudaMemcpyAsync(to.raw(), from.raw(), static_cast<size_t>(from.num_bytes()),
                                 cudaMemcpyDeviceToDevice, stream_.get()));
      return;
    }
    const Pitched rows = PitchedOf(to);
    CUDA_CHECK(cudaMemcpy2DAsync(rows.data, rows.pitch_bytes, from.raw(), rows.row_bytes,
                                 rows.row_bytes, rows.num_rows, cudaMemcpyDeviceToDevice,
                                 stream_.get()));
  }

  absl::StatusOr<std::unique_ptr<Recording>> Record(
      absl::FunctionRef<absl::Status()> queue_work) override {
    // Thread-local: other threads may go on using the device.
    CUDA_CHECK(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal));
    const absl::Status status = queue_work();
    cudaGraph_t graph = nullptr;
    CUDA_CHECK(cudaStreamEndCapture(stream_.get(), &graph));
    if (status.ok()) return std::make_unique<CudaRecording>(graph, stream_.get());
    CUDA_CHECK(cudaGraphDestroy(graph));
    return status;
  }

  absl::StatusOr<std::unique_ptr<PeerMemory>> OpenPeerMemory(
      const PeerMemoryOptions& options) override {
    return OpenCudaPeerMemory(options, peer_window_, stream_.get());
  }
  void* stream() const override { return stream_.get(); }

 private:
  PeerWindow peer_window_;
  CudaStream stream_;
  StreamMarks copies_;
  CudaOps ops_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Device>> OpenCudaDevice(const DeviceOptions& options) {
  RETURN_IF_ERROR(ChooseGpu(options.gpu, options.cuda_visible_devices));
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    const char* const why =
        error != cudaSuccess ? cudaGetErrorString(error) : "the driver found none";
    return absl::UnavailableError(absl::StrCat("there is no GPU", NoSuchGpu(options.gpu), ": ", why,
                                               "; expected one, or --device cpu"));
  }
  cudaDeviceProp device;
  CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  if (!IsSupported(device)) {
    return absl::UnavailableError(
        absl::StrCat(device.name, " has compute capability ", device.major, ".", device.minor,
                     "; expected 9.0 (Hopper) or 10.0 (Blackwell), or --device cpu"));
  }
  return std::make_unique<CudaDevice>(device);
}

}  // namespace fathom
