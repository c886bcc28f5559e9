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
  // Logs how late steps ended: on a machine without a core to spare the times are not the
  // profile's.
  ~SimulatedRunner() override;

  uint64_t epoch() const override { return options_.epoch; }

  // Returns when the step's time is over, counted from the call: some tens of microseconds late on
  // a machine that is not overloaded.
  absl::StatusOr<v1::StepResult> Run(const v1::StepCommand& command) override;
  void Abort() override;

 private:
  absl::Status SleepUntil(absl::Time deadline);

  const SimulatedRunnerOptions options_;
  SimulatedSteps steps_;
  int64_t num_timed_steps_ = 0;
  absl::Duration lateness_ = absl::ZeroDuration();  // of all steps together
  absl::Duration most_lateness_ = absl::ZeroDuration();

  absl::Mutex mutex_;
  bool is_aborted_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace fathom
