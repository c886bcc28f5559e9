// Simulated steps that take the time which a profile gives them.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "worker/shard_host.h"
#include "worker/sim_profile.h"
#include "worker/simulated_steps.h"
#include "worker/slot_table.h"

namespace fathom {

// When a device begins a step whose command arrived at `arrived`, if the step ahead of it ends at
// `free_at` and its host looks at it `now`.
inline absl::Time StepStart(absl::Time arrived, absl::Time free_at, absl::Time now) {
  return arrived <= free_at ? free_at : now;
}

struct SimulatedRunnerOptions {
  uint64_t epoch = 0;
  int rank = 0;
  SlotTableOptions slots = {};
  SimProfile profile = {};
  std::vector<int> eos_token_ids = {};  // ascending; not all tokens
};

class SimulatedRunner final : public StepMaker {
 public:
  explicit SimulatedRunner(SimulatedRunnerOptions options);
  // Logs how late ends of steps were noticed: on a machine without a core to spare it is not only
  // the profile that takes time.
  ~SimulatedRunner() override;

  uint64_t epoch() const override { return options_.epoch; }

  // Returns when the step's time is over, or some tens of microseconds later. A device works
  // through its queue whether or not its host keeps up: a command that was there before the step
  // ahead of it had ended begins when that ends, and any other one when it is run.
  absl::StatusOr<v1::StepResult> Run(const v1::StepCommand& command, absl::Time arrived) override;
  void Abort() override;

 private:
  absl::Status SleepUntil(absl::Time deadline);

  const SimulatedRunnerOptions options_;
  SimulatedSteps steps_;
  absl::Time free_at_ = absl::InfinitePast();  // when the last step ends
  int64_t num_timed_steps_ = 0;
  absl::Duration lateness_ = absl::ZeroDuration();  // of all steps together
  absl::Duration most_lateness_ = absl::ZeroDuration();

  absl::Mutex mutex_;
  bool is_aborted_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace fathom
