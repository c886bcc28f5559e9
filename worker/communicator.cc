#include "worker/communicator.h"

#include <atomic>
#include <cstring>

#include "base/check.h"

namespace fathom {
namespace {

class LonelyCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int world_size() const override { return 1; }

  absl::Status AllReduceSum(const Tensor&) override { return State(); }

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

std::unique_ptr<Communicator> MakeLonelyCommunicator() {
  return std::make_unique<LonelyCommunicator>();
}

}  // namespace fathom
