#include "worker/simulated_runner.h"

#include <sys/prctl.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "proto/worker.pb.h"
#include "spdlog/spdlog.h"

namespace fathom {
namespace {

SimStep StepOf(const StepBatch& batch) {
  const auto sum = [](const std::vector<int32_t>& numbers) {
    return static_cast<double>(std::accumulate(numbers.begin(), numbers.end(), int64_t{0}));
  };
  const auto tokens = static_cast<double>(batch.num_tokens());
  return {.tokens = tokens,
          .sequences = static_cast<double>(batch.num_sequences()),
          .context_tokens = sum(batch.context_lens),
          .attention_pairs = sum(batch.positions) + tokens};
}

}  // namespace

SimulatedRunner::SimulatedRunner(SimulatedRunnerOptions options)
    : options_(std::move(options)),
      steps_({.epoch = options_.epoch,
              .rank = options_.rank,
              .slots = options_.slots,
              .eos_token_ids = options_.eos_token_ids}) {}

SimulatedRunner::~SimulatedRunner() {
  if (num_timed_steps_ == 0) return;
  spdlog::info(
      "epoch {}: {} ends of simulated steps were noticed {:.0f} us late on average, {:.0f} us at "
      "most",
      options_.epoch, num_timed_steps_,
      absl::ToDoubleMicroseconds(lateness_) / static_cast<double>(num_timed_steps_),
      absl::ToDoubleMicroseconds(most_lateness_));
}

absl::StatusOr<v1::StepResult> SimulatedRunner::Run(const v1::StepCommand& command,
                                                    absl::Time arrived) {
  const absl::Time start = StepStart(arrived, free_at_, absl::Now());
  ASSIGN_OR_RETURN(const StepPlan plan, steps_.Apply(command));
  v1::StepResult result = steps_.Answer(plan);
  if (plan.batch.num_tokens() > 0) {
    const double microseconds = StepMicroseconds(options_.profile, StepOf(plan.batch));
    free_at_ = start + absl::Microseconds(microseconds);
    RETURN_IF_ERROR(SleepUntil(free_at_));
    result.set_compute_us(absl::ToInt64Microseconds(free_at_ - start));
  }
  return result;
}

absl::Status SimulatedRunner::SleepUntil(absl::Time deadline) {
  // Linux adds up to 50 µs to a thread's sleeps unless it asks for less.
  prctl(PR_SET_TIMERSLACK, 1UL);
  {
    absl::MutexLock lock(&mutex_);
    if (mutex_.AwaitWithDeadline(absl::Condition(&is_aborted_), deadline)) {
      return absl::AbortedError(absl::StrCat("rank ", options_.rank, ", step ", steps_.last_step(),
                                             " of epoch ", options_.epoch, ": aborted"));
    }
  }
  const absl::Duration lateness = absl::Now() - deadline;
  ++num_timed_steps_;
  lateness_ += lateness;
  most_lateness_ = std::max(most_lateness_, lateness);
  return absl::OkStatus();
}

void SimulatedRunner::Abort() {
  absl::MutexLock lock(&mutex_);
  is_aborted_ = true;
}

}  // namespace fathom
