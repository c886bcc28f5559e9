#include "worker/communicator.h"

#include <atomic>
#include <cstring>

#include "base/check.h"
#include "base/status_macros.h"

namespace fathom {
namespace {

std::atomic<int64_t> last_communicator_id = 0;

class LonelyCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int world_size() const override { return 1; }

  absl::Status AllReduceSum(const Tensor&) override { return State(); }
  bool is_recordable() const override { return true; }

  absl::Status GatherToRank0(const Tensor& part, const Tensor& whole) override {
    CHECK(part.dense() && whole.dense());
    CHECK_EQ(part.num_bytes(), whole.num_bytes());
    if (part.raw() != whole.raw()) std::memcpy(whole.raw(), part.raw(), part.num_bytes());
    return State();
  }

  absl::Status BroadcastFromRank0(void*, int64_t) override { return State(); }

  void Abort() override { aborted_ = true; }

 private:
  absl::Status State() const {
    return aborted_ ? absl::AbortedError("rank 0 was told to stop") : absl::OkStatus();
  }

  std::atomic<bool> aborted_ = false;
};

}  // namespace

Communicator::Communicator() : id_(++last_communicator_id) {}

absl::Status Communicator::AllReduceAddRmsNorm(Ops& ops, const Tensor& partial,
                                               const Tensor& residual, const Tensor& weight,
                                               float eps, const Tensor& normed,
                                               const LinearInput& quantized) {
  RETURN_IF_ERROR(AllReduceSum(partial));
  ops.AddRmsNorm(residual, partial, weight, eps, normed, quantized);
  return absl::OkStatus();
}

std::unique_ptr<Communicator> MakeLonelyCommunicator() {
  return std::make_unique<LonelyCommunicator>();
}

}  // namespace fathom
