#include "worker/staged_communicator.h"

#include <utility>
#include <vector>

#include "base/check.h"
#include "base/status_macros.h"

namespace fathom {
namespace {

class StagedCommunicator final : public Communicator {
 public:
  StagedCommunicator(Device& device, std::unique_ptr<Communicator> host)
      : device_(device), host_(std::move(host)) {}

  int rank() const override { return host_->rank(); }
  int world_size() const override { return host_->world_size(); }

  absl::Status AllReduceSum(const Tensor& tensor) override {
    if (tensor.num_elements() == 0) return host_->AllReduceSum(tensor);
    const Tensor staged = Stage(tensor, part_);
    device_.CopyToHost(tensor, staged.raw());
    RETURN_IF_ERROR(host_->AllReduceSum(staged));
    device_.CopyFromHost(staged.raw(), tensor);
    return absl::OkStatus();
  }

  absl::Status GatherToRank0(const Tensor& part, const Tensor& whole) override {
    const Tensor staged_part = Stage(part, part_);
    const Tensor staged_whole = whole.present() ? Stage(whole, whole_) : Tensor();
    device_.CopyToHost(part, staged_part.raw());
    RETURN_IF_ERROR(host_->GatherToRank0(staged_part, staged_whole));
    if (whole.present()) device_.CopyFromHost(staged_whole.raw(), whole);
    return absl::OkStatus();
  }

  // Of the host's memory already.
  absl::Status BroadcastFromRank0(void* bytes, int64_t num_bytes) override {
    return host_->BroadcastFromRank0(bytes, num_bytes);
  }

  void Abort() override { host_->Abort(); }

 private:
  // Host memory for the elements of a dense tensor.
  static Tensor Stage(const Tensor& tensor, std::vector<char>& memory) {
    CHECK(tensor.dense()) << tensor.DebugString();
    if (static_cast<int64_t>(memory.size()) < tensor.num_bytes()) memory.resize(tensor.num_bytes());
    return Tensor(memory.data(), tensor.dtype(), {tensor.num_elements()});
  }

  Device& device_;
  const std::unique_ptr<Communicator> host_;
  std::vector<char> part_;
  std::vector<char> whole_;
};

}  // namespace

std::unique_ptr<Communicator> MakeStagedCommunicator(Device& device,
                                                     std::unique_ptr<Communicator> host) {
  return std::make_unique<StagedCommunicator>(device, std::move(host));
}

}  // namespace fathom
