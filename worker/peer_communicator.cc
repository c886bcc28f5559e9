#include "worker/peer_communicator.h"

#include <atomic>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/ops.h"

namespace fathom {
namespace {

class PeerCommunicator final : public GroupCommunicator {
 public:
  PeerCommunicator(const PeerCommunicatorOptions& options, Device& device,
                   std::unique_ptr<GroupCommunicator> host)
      : options_(options), device_(device), host_(std::move(host)) {
    CHECK_EQ(host_->rank(), options.rank);
    CHECK_EQ(host_->world_size(), options.world_size);
  }
  ~PeerCommunicator() override { Abort(); }

  absl::Status Connect(Blackboard& blackboard, absl::Time deadline) override;

  int rank() const override { return options_.rank; }
  int world_size() const override { return options_.world_size; }

  absl::Status AllReduceSum(const Tensor& tensor) override {
    RETURN_IF_ERROR(status());
    peers().AllReduceSum(tensor);
    return absl::OkStatus();
  }
  absl::Status AllReduceAddRmsNorm(Ops& ops, const Tensor& partial, const Tensor& residual,
                                   const Tensor& weight, float eps, const Tensor& normed,
                                   const LinearInput& quantized) override {
    RETURN_IF_ERROR(status());
    const bool is_fused = peers().AllReduceAddRmsNorm(partial, residual, weight, eps, normed,
                                                      quantized.values, quantized.scales);
    if (is_fused) return absl::OkStatus();
    return Communicator::AllReduceAddRmsNorm(ops, partial, residual, weight, eps, normed,
                                             quantized);
  }
  bool is_recordable() const override { return true; }
  absl::Status GatherToRank0(const Tensor& part, const Tensor& whole) override {
    RETURN_IF_ERROR(status());
    peers().GatherToRank0(part, whole);
    return absl::OkStatus();
  }
  absl::Status BroadcastFromRank0(void* bytes, int64_t num_bytes) override {
    RETURN_IF_ERROR(status());
    const absl::Status sent = host_->BroadcastFromRank0(bytes, num_bytes);
    if (!sent.ok()) Abort();
    return sent;
  }

  absl::Status status() const override;
  void Abort() override;

 private:
  PeerMemory& peers() const {
    CHECK(peers_ != nullptr) << "not connected";
    return *peers_;
  }
  // This rank's part of connecting, once all ranks are here.
  absl::Status Reach(const std::vector<std::string>& handles);
  absl::StatusOr<std::vector<std::string>> ExchangeHandles(const std::string& own);

  const PeerCommunicatorOptions options_;
  Device& device_;
  const std::unique_ptr<GroupCommunicator> host_;

  std::atomic<bool> aborted_ = false;
  absl::Mutex mutex_;  // of opening against aborting
  std::unique_ptr<PeerMemory> peers_;
};

absl::Status PeerCommunicator::Connect(Blackboard& blackboard, absl::Time deadline) {
  RETURN_IF_ERROR(host_->Connect(blackboard, deadline));
  // From here on every rank takes part in all meetings, whatever it finds: none may wait in vain.
  absl::StatusOr<std::unique_ptr<PeerMemory>> opened = device_.OpenPeerMemory(
      {.rank = options_.rank, .world_size = options_.world_size, .timeout = options_.timeout});
  absl::Status found = opened.status();
  if (opened.ok()) {
    absl::MutexLock lock(&mutex_);
    peers_ = *std::move(opened);
    if (aborted_) peers_->Abort();
  }
  ASSIGN_OR_RETURN(const std::vector<std::string> handles,
                   ExchangeHandles(peers_ == nullptr ? "" : peers_->handle()));
  if (found.ok()) found = Reach(handles);

  // The last meeting before the first collective: everybody's memory is ready now, or somebody's
  // is not.
  float num_failed = found.ok() ? 0.0f : 1.0f;
  RETURN_IF_ERROR(host_->AllReduceSum(Tensor(&num_failed, DType::kF32, {1})));
  if (found.ok() && num_failed > 0) {
    found = absl::AbortedError("another rank could not reach all GPUs' memory");
  }
  return found;
}

absl::Status PeerCommunicator::Reach(const std::vector<std::string>& handles) {
  for (int rank = 0; rank < options_.world_size; ++rank) {
    if (!handles[rank].empty()) continue;
    return absl::AbortedError(absl::StrCat("rank ", rank, " has no memory to share"));
  }
  return peers_->Connect(handles);
}

absl::StatusOr<std::vector<std::string>> PeerCommunicator::ExchangeHandles(const std::string& own) {
  constexpr size_t kBytes = 256;  // of a handle with its length before it
  static_assert(kBytes % sizeof(int32_t) == 0);
  CHECK_LT(own.size(), kBytes - 1);
  std::string padded(1, static_cast<char>(own.size()));
  padded.append(own).resize(kBytes);
  std::string all(kBytes * options_.world_size, '\0');
  constexpr auto kWords = static_cast<int64_t>(kBytes / sizeof(int32_t));
  const Tensor part(padded.data(), DType::kI32, {kWords});
  const Tensor whole(all.data(), DType::kI32, {options_.world_size, kWords});
  RETURN_IF_ERROR(host_->GatherToRank0(part, options_.rank == 0 ? whole : Tensor()));
  RETURN_IF_ERROR(host_->BroadcastFromRank0(all.data(), static_cast<int64_t>(all.size())));
  std::vector<std::string> handles;
  for (int rank = 0; rank < options_.world_size; ++rank) {
    const char* const begin = all.data() + rank * kBytes;
    handles.emplace_back(begin + 1, static_cast<unsigned char>(*begin));
  }
  return handles;
}

absl::Status PeerCommunicator::status() const {
  if (aborted_) {
    return absl::AbortedError(absl::StrCat("rank ", options_.rank, " was told to stop"));
  }
  const PeerFault fault = peers().fault();
  switch (fault.kind) {
    case PeerFault::Kind::kNone:
      return absl::OkStatus();
    case PeerFault::Kind::kAborted:
      return absl::AbortedError(absl::StrCat("rank ", options_.rank, " was told to stop"));
    case PeerFault::Kind::kTimedOut:
      break;
  }
  return absl::DeadlineExceededError(absl::StrCat("the GPU of rank ", options_.rank, " waited ",
                                                  absl::FormatDuration(options_.timeout),
                                                  " in vain for rank ", fault.silent_rank));
}

void PeerCommunicator::Abort() {
  aborted_ = true;
  host_->Abort();
  absl::MutexLock lock(&mutex_);
  if (peers_ != nullptr) peers_->Abort();
}

}  // namespace

std::unique_ptr<GroupCommunicator> MakePeerCommunicator(const PeerCommunicatorOptions& options,
                                                        Device& device,
                                                        std::unique_ptr<GroupCommunicator> host) {
  return std::make_unique<PeerCommunicator>(options, device, std::move(host));
}

}  // namespace fathom
