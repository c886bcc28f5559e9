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

// How long before a deadline sleeping ends: about what Linux takes to wake a thread. The rest is
// polled; no longer, since all the ranks of a host poll at once and take the cores from who would
// send the next step.
constexpr absl::Duration kWakeUpTime = absl::Microseconds(20);

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

// What the invented distribution says of `token_id` and of the `num_top` best tokens.
void WriteLogprobs(int32_t token_id, int32_t next, int vocab_size, int num_top,
                   v1::TokenLogprobs& to) {
  const int rank = SimRank(token_id, next, vocab_size);
  to.set_token_id(token_id);
  to.set_rank(rank);
  to.set_logprob(SimLogprob(rank));
  for (int i = 0; i < std::min(num_top, vocab_size); ++i) {
    to.add_top_token_ids((next + i) % vocab_size);
    to.add_top_logprobs(SimLogprob(i + 1));
  }
}

}  // namespace

SimulatedRunner::SimulatedRunner(SimulatedRunnerOptions options)
    : options_(std::move(options)),
      slots_(options_.slots),
      prefixes_(options_.slots.max_sequences) {}

SimulatedRunner::~SimulatedRunner() {
  if (num_timed_steps_ == 0) return;
  spdlog::info("epoch {}: {} simulated steps ended {:.0f} us late on average, {:.0f} us at most",
               options_.epoch, num_timed_steps_,
               absl::ToDoubleMicroseconds(lateness_) / static_cast<double>(num_timed_steps_),
               absl::ToDoubleMicroseconds(most_lateness_));
}

absl::StatusOr<v1::StepResult> SimulatedRunner::Run(const v1::StepCommand& command) {
  const absl::Time start = absl::Now();
  RETURN_IF_ERROR(CheckStepOrder(command, options_.epoch, last_step_));
  last_step_ = command.step();
  const absl::StatusOr<StepPlan> plan = slots_.Apply(command);
  if (!plan.ok()) {
    return absl::Status(plan.status().code(),
                        absl::StrCat("rank ", options_.rank, ", step ", command.step(),
                                     " of epoch ", options_.epoch, ": ", plan.status().message()));
  }
  for (const v1::SequenceAdmission& admission : command.admitted()) {
    prefixes_[admission.slot()] = SimPrefix();
  }
  v1::StepResult result;
  result.set_epoch(options_.epoch);
  result.set_step(command.step());
  if (plan->batch.num_tokens() > 0) {
    if (options_.rank == 0) ReportPromptLogprobs(*plan, result);
    Choose(*plan, result);
    const double microseconds = StepMicroseconds(options_.profile, StepOf(plan->batch));
    RETURN_IF_ERROR(SleepUntil(start + absl::Microseconds(microseconds)));
  }
  result.set_compute_us(absl::ToInt64Microseconds(absl::Now() - start));
  return result;
}

SimPrefix& SimulatedRunner::PrefixOf(int slot, int end) {
  SimPrefix& prefix = prefixes_[slot];
  prefix.AppendUpTo(slots_.token_ids(slot), end);
  return prefix;
}

int32_t SimulatedRunner::NextToken(const SimPrefix& prefix) const {
  return prefix.NextToken(options_.slots.vocab_size, options_.eos_token_ids);
}

void SimulatedRunner::ReportPromptLogprobs(const StepPlan& plan, v1::StepResult& result) {
  v1::SlotLogprobs* current = nullptr;
  for (const StepPlan::PromptRow& row : plan.prompt_rows) {
    if (current == nullptr || current->slot() != static_cast<uint32_t>(row.slot)) {
      current = result.add_prompt_logprobs();
      current->set_slot(row.slot);
    }
    WriteLogprobs(
        row.token_id, NextToken(PrefixOf(row.slot, row.position)), options_.slots.vocab_size,
        slots_.sampling(row.slot).num_prompt_logprobs.value_or(0), *current->add_logprobs());
  }
}

void SimulatedRunner::Choose(const StepPlan& plan, v1::StepResult& result) {
  for (const StepPlan::SampledRow& row : plan.sampled) {
    const auto num_tokens = static_cast<int>(slots_.token_ids(row.slot).size());
    const int32_t token_id = NextToken(PrefixOf(row.slot, num_tokens));
    slots_.AppendSampledToken(row.slot, token_id);
    if (options_.rank != 0) continue;
    result.add_sampled_slots(row.slot);
    result.add_sampled_token_ids(token_id);
    const SamplingParams& sampling = slots_.sampling(row.slot);
    if (!sampling.num_logprobs.has_value()) continue;
    v1::SlotLogprobs& report = *result.add_logprobs();
    report.set_slot(row.slot);
    WriteLogprobs(token_id, token_id, options_.slots.vocab_size, *sampling.num_logprobs,
                  *report.add_logprobs());
  }
}

absl::Status SimulatedRunner::SleepUntil(absl::Time deadline) {
  // Linux adds up to 50 µs to a thread's sleeps unless it asks for less.
  prctl(PR_SET_TIMERSLACK, 1UL);
  {
    absl::MutexLock lock(&mutex_);
    if (mutex_.AwaitWithDeadline(absl::Condition(&is_aborted_), deadline - kWakeUpTime)) {
      return absl::AbortedError(absl::StrCat("rank ", options_.rank, ", step ", last_step_,
                                             " of epoch ", options_.epoch, ": aborted"));
    }
  }
  absl::Duration lateness;
  do {
    lateness = absl::Now() - deadline;
  } while (lateness < absl::ZeroDuration());
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
