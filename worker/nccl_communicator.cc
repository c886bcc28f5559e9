#include "worker/nccl_communicator.h"

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <nccl.h>

#include <atomic>
#include <string>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/cuda/cuda_check.h"

namespace fathom {
namespace {

constexpr char kLibrary[] = "libnccl.so.2";
constexpr absl::Duration kPollInterval = absl::Milliseconds(5);
constexpr absl::Duration kIdLookupInterval = absl::Milliseconds(200);

// The functions that are used, from the library.
struct Nccl {
  decltype(&ncclGetUniqueId) GetUniqueId;
  decltype(&ncclCommInitRankConfig) CommInitRankConfig;
  decltype(&ncclCommGetAsyncError) CommGetAsyncError;
  decltype(&ncclCommAbort) CommAbort;
  decltype(&ncclAllReduce) AllReduce;
  decltype(&ncclSend) Send;
  decltype(&ncclRecv) Recv;
  decltype(&ncclGroupStart) GroupStart;
  decltype(&ncclGroupEnd) GroupEnd;
  decltype(&ncclGetErrorString) GetErrorString;
  decltype(&ncclGetLastError) GetLastError;
};

template <typename Function>
bool Find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

absl::StatusOr<Nccl> LoadNccl() {
  void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return absl::UnavailableError(absl::StrCat(
        "--collectives nccl needs NVIDIA's library NCCL: ", dlerror(),
        "; expected it among the system's libraries or in a folder of LD_LIBRARY_PATH"));
  }
  Nccl nccl;
  const bool is_whole =
      Find(library, "ncclGetUniqueId", nccl.GetUniqueId) &&
      Find(library, "ncclCommInitRankConfig", nccl.CommInitRankConfig) &&
      Find(library, "ncclCommGetAsyncError", nccl.CommGetAsyncError) &&
      Find(library, "ncclCommAbort", nccl.CommAbort) &&
      Find(library, "ncclAllReduce", nccl.AllReduce) && Find(library, "ncclSend", nccl.Send) &&
      Find(library, "ncclRecv", nccl.Recv) && Find(library, "ncclGroupStart", nccl.GroupStart) &&
      Find(library, "ncclGroupEnd", nccl.GroupEnd) &&
      Find(library, "ncclGetErrorString", nccl.GetErrorString) &&
      Find(library, "ncclGetLastError", nccl.GetLastError);
  if (is_whole) return nccl;
  return absl::UnavailableError(
      absl::StrCat(kLibrary, " is too old: ", dlerror(), "; expected NCCL 2.18 or later"));
}

class NcclCommunicator final : public GroupCommunicator {
 public:
  NcclCommunicator(const NcclCommunicatorOptions& options, const Nccl& nccl, cudaStream_t stream,
                   std::unique_ptr<GroupCommunicator> host)
      : options_(options), nccl_(nccl), stream_(stream), host_(std::move(host)) {
    CUDA_CHECK(cudaGetDevice(&gpu_));
    CUDA_CHECK(cudaEventCreateWithFlags(&queued_, cudaEventDisableTiming));
  }
  ~NcclCommunicator() override {
    Abort();
    if (watchdog_.joinable()) watchdog_.join();
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    CUDA_CHECK(cudaEventDestroy(queued_));
  }

  absl::Status Connect(Blackboard& blackboard, absl::Time deadline) override;

  int rank() const override { return options_.rank; }
  int world_size() const override { return options_.world_size; }
  absl::Status AllReduceSum(const Tensor& tensor) override;
  bool is_recordable() const override { return true; }
  absl::Status GatherToRank0(const Tensor& part, const Tensor& whole) override;
  absl::Status BroadcastFromRank0(void* bytes, int64_t num_bytes) override;
  absl::Status status() const override;
  void Abort() override {
    aborted_ = true;
    host_->Abort();
  }

 private:
  absl::StatusOr<ncclUniqueId> ShareId(Blackboard& blackboard, absl::Time deadline);
  // Calls NCCL unless the watchdog has ended the communicator, and not while it does.
  template <typename Function>
  ncclResult_t Call(Function&& function) {
    absl::MutexLock lock(&comm_mutex_);
    return is_over_ ? ncclInvalidUsage : function(comm_);
  }
  // Waits until NCCL has taken what it was told to do, which need not be done then.
  absl::Status AwaitTaken(const char* what, ncclResult_t result, absl::Time deadline);
  // The same, and from now on the watchdog awaits its end.
  absl::Status Queued(const char* what, ncclResult_t result);
  absl::Status Failed(const std::string& what, ncclResult_t result) const;

  void Watch();
  // Why everything must end; OK if nothing must.
  absl::Status Look();

  const NcclCommunicatorOptions options_;
  const Nccl nccl_;
  const cudaStream_t stream_;
  const std::unique_ptr<GroupCommunicator> host_;
  int gpu_ = 0;
  std::thread watchdog_;

  absl::Mutex comm_mutex_;
  ncclComm_t comm_ = nullptr;  // used with the mutex, except by the watchdog, which ends it

  std::atomic<bool> aborted_ = false;
  std::atomic<bool> is_over_ = false;  // comm_ is gone

  mutable absl::Mutex mutex_;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
  cudaEvent_t queued_ ABSL_GUARDED_BY(mutex_) = nullptr;  // after the last collective
  absl::Time queued_until_ ABSL_GUARDED_BY(mutex_) = absl::InfiniteFuture();  // when it is over
};

absl::Status NcclCommunicator::Connect(Blackboard& blackboard, absl::Time deadline) {
  RETURN_IF_ERROR(host_->Connect(blackboard, deadline));
  ASSIGN_OR_RETURN(const ncclUniqueId id, ShareId(blackboard, deadline));
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  const ncclResult_t started =
      nccl_.CommInitRankConfig(&comm_, options_.world_size, id, options_.rank, &config);
  const absl::Status connected = AwaitTaken("connecting", started, deadline);
  if (comm_ == nullptr) return connected;
  if (!connected.ok()) {
    nccl_.CommAbort(comm_);
    is_over_ = true;
    return connected;
  }
  watchdog_ = std::thread([this] { Watch(); });
  // Who has connected knows only of itself; this meeting stands for all.
  char hello = 0;
  return host_->BroadcastFromRank0(&hello, 1);
}

absl::StatusOr<ncclUniqueId> NcclCommunicator::ShareId(Blackboard& blackboard,
                                                       absl::Time deadline) {
  const std::string key = "nccl unique id";
  ncclUniqueId id = {};
  if (options_.rank == 0) {
    const ncclResult_t made = nccl_.GetUniqueId(&id);
    if (made != ncclSuccess) return Failed("finding an address", made);
    RETURN_IF_ERROR(blackboard.Publish(key, std::string(id.internal, sizeof id.internal)));
    return id;
  }
  while (true) {
    if (aborted_) return status();
    const absl::StatusOr<std::string> value =
        blackboard.Lookup(key, std::min(deadline, absl::Now() + kIdLookupInterval));
    if (value.ok() && value->size() == sizeof id.internal) {
      value->copy(id.internal, sizeof id.internal);
      return id;
    }
    if (value.ok()) return absl::InternalError("rank 0 published no NCCL id");
    if (!absl::IsDeadlineExceeded(value.status())) return value.status();
    if (absl::Now() >= deadline) {
      return absl::DeadlineExceededError("rank 0 did not set up NCCL in time");
    }
  }
}

absl::Status NcclCommunicator::AwaitTaken(const char* what, ncclResult_t result,
                                          absl::Time deadline) {
  while (result == ncclInProgress) {
    if (aborted_ || is_over_) return status();
    if (absl::Now() >= deadline) {
      return absl::DeadlineExceededError(absl::StrCat(
          "rank ", options_.rank, " waited in vain for other ranks: NCCL is still ", what));
    }
    absl::SleepFor(absl::Microseconds(50));
    const ncclResult_t asked =
        Call([&](ncclComm_t comm) { return nccl_.CommGetAsyncError(comm, &result); });
    if (asked != ncclSuccess) result = asked;
  }
  if (is_over_) return status();
  return result == ncclSuccess ? absl::OkStatus() : Failed(what, result);
}

absl::Status NcclCommunicator::Queued(const char* what, ncclResult_t result) {
  RETURN_IF_ERROR(AwaitTaken(what, result, absl::Now() + options_.timeout));
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  CUDA_CHECK(cudaStreamIsCapturing(stream_, &capture));
  if (capture != cudaStreamCaptureStatusNone) return absl::OkStatus();
  absl::MutexLock lock(&mutex_);
  CUDA_CHECK(cudaEventRecord(queued_, stream_));
  queued_until_ = absl::Now() + options_.timeout;
  return absl::OkStatus();
}

absl::Status NcclCommunicator::AllReduceSum(const Tensor& tensor) {
  RETURN_IF_ERROR(status());
  CHECK(tensor.dense()) << tensor.DebugString();
  CHECK(tensor.dtype() == DType::kF32 || tensor.dtype() == DType::kBF16) << tensor.DebugString();
  if (tensor.num_elements() == 0) return absl::OkStatus();
  const auto count = static_cast<size_t>(tensor.num_elements());
  const ncclDataType_t type = tensor.dtype() == DType::kF32 ? ncclFloat32 : ncclBfloat16;
  return Queued("summing", Call([&](ncclComm_t comm) {
                  return nccl_.AllReduce(tensor.raw(), tensor.raw(), count, type, ncclSum, comm,
                                         stream_);
                }));
}

absl::Status NcclCommunicator::GatherToRank0(const Tensor& part, const Tensor& whole) {
  RETURN_IF_ERROR(status());
  CHECK(part.dense()) << part.DebugString();
  const auto num_bytes = static_cast<size_t>(part.num_bytes());
  if (num_bytes == 0) return absl::OkStatus();
  if (options_.rank != 0) {
    return Queued("gathering", Call([&](ncclComm_t comm) {
                    return nccl_.Send(part.raw(), num_bytes, ncclInt8, 0, comm, stream_);
                  }));
  }
  CHECK(whole.dense()) << whole.DebugString();
  CHECK_EQ(whole.num_bytes(), part.num_bytes() * options_.world_size);
  auto* const target = static_cast<char*>(whole.raw());
  if (part.raw() != target) {
    CUDA_CHECK(cudaMemcpyAsync(target, part.raw(), num_bytes, cudaMemcpyDeviceToDevice, stream_));
  }
  if (options_.world_size == 1) return absl::OkStatus();
  return Queued("gathering", Call([&](ncclComm_t comm) {
                  nccl_.GroupStart();
                  for (int peer = 1; peer < options_.world_size; ++peer) {
                    nccl_.Recv(target + peer * num_bytes, num_bytes, ncclInt8, peer, comm, stream_);
                  }
                  return nccl_.GroupEnd();
                }));
}

absl::Status NcclCommunicator::BroadcastFromRank0(void* bytes, int64_t num_bytes) {
  RETURN_IF_ERROR(status());
  const absl::Status sent = host_->BroadcastFromRank0(bytes, num_bytes);
  if (!sent.ok()) Abort();
  return sent;
}

absl::Status NcclCommunicator::status() const {
  {
    absl::MutexLock lock(&mutex_);
    if (!failure_.ok()) return failure_;
  }
  if (!aborted_) return absl::OkStatus();
  return absl::AbortedError(absl::StrCat("rank ", options_.rank, " was told to stop"));
}

absl::Status NcclCommunicator::Failed(const std::string& what, ncclResult_t result) const {
  return absl::UnavailableError(absl::StrCat(
      "NCCL failed ", what, " at rank ", options_.rank, ": ", nccl_.GetErrorString(result), ": ",
      nccl_.GetLastError(nullptr), " (NCCL_DEBUG=INFO tells more)"));
}

void NcclCommunicator::Watch() {
  CUDA_CHECK(cudaSetDevice(gpu_));
  while (!aborted_) {
    const absl::Status found = Look();
    if (!found.ok()) {
      absl::MutexLock lock(&mutex_);
      failure_ = found;
      break;
    }
    absl::SleepFor(kPollInterval);
  }
  host_->Abort();
  {
    absl::MutexLock lock(&comm_mutex_);
    is_over_ = true;  // from here on nobody else uses it
  }
  // Ends kernels that wait; returns once all recordings with calls of it are gone, which those who
  // wait for these kernels see to.
  nccl_.CommAbort(comm_);
}

absl::Status NcclCommunicator::Look() {
  ncclResult_t result = ncclSuccess;
  const ncclResult_t asked = nccl_.CommGetAsyncError(comm_, &result);
  if (asked != ncclSuccess) result = asked;
  if (result != ncclSuccess && result != ncclInProgress) return Failed("in a collective", result);
  absl::MutexLock lock(&mutex_);
  if (queued_until_ == absl::InfiniteFuture()) return absl::OkStatus();
  const cudaError_t state = cudaEventQuery(queued_);
  if (state == cudaSuccess) {
    queued_until_ = absl::InfiniteFuture();
  } else if (state != cudaErrorNotReady) {
    CUDA_CHECK(state);
  } else if (absl::Now() > queued_until_) {
    return absl::DeadlineExceededError(absl::StrCat(
        "a collective of rank ", options_.rank, " was not over ",
        absl::FormatDuration(options_.timeout), " after it was queued: another rank hangs"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<GroupCommunicator>> MakeNcclCommunicator(
    const NcclCommunicatorOptions& options, Device& device,
    std::unique_ptr<GroupCommunicator> host) {
  CHECK(host->rank() == options.rank && host->world_size() == options.world_size);
  if (device.stream() == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("--collectives nccl is for GPUs, not for a ", device.name(),
                     ": expected shm on one host, gloo between hosts"));
  }
  static const absl::StatusOr<Nccl>& nccl = *new absl::StatusOr<Nccl>(LoadNccl());
  RETURN_IF_ERROR(nccl.status());
  return std::make_unique<NcclCommunicator>(
      options, *nccl, static_cast<cudaStream_t>(device.stream()), std::move(host));
}

}  // namespace fathom
