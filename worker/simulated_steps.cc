#include "worker/simulated_steps.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "proto/worker.pb.h"
#include "worker/shard_host.h"

namespace fathom {
namespace {

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

void AddFault(int slot, const char* reason, v1::StepResult& result) {
  v1::SlotFault& fault = *result.add_faults();
  fault.set_slot(slot);
  fault.set_reason(reason);
}

}  // namespace

SimulatedSteps::SimulatedSteps(SimulatedStepsOptions options)
    : options_(std::move(options)),
      slots_(options_.slots),
      prefixes_(options_.slots.max_sequences) {}

absl::StatusOr<StepPlan> SimulatedSteps::Apply(const v1::StepCommand& command) {
  RETURN_IF_ERROR(CheckStepOrder(command, options_.epoch, last_step_));
  last_step_ = command.step();
  absl::StatusOr<StepPlan> plan = slots_.Apply(command);
  if (!plan.ok()) {
    return absl::Status(plan.status().code(),
                        absl::StrCat("rank ", options_.rank, ", step ", command.step(),
                                     " of epoch ", options_.epoch, ": ", plan.status().message()));
  }
  for (const v1::SequenceAdmission& admission : command.admitted()) {
    prefixes_[admission.slot()] = SimPrefix();
  }
  return plan;
}

v1::StepResult SimulatedSteps::Answer(const StepPlan& plan, std::optional<int> faulty_slot) {
  v1::StepResult result;
  result.set_epoch(options_.epoch);
  result.set_step(last_step_);
  if (options_.rank == 0) {
    for (const int slot : plan.slots_with_faults) {
      AddFault(slot, "it had a fault in an earlier step", result);
    }
    ReportPromptLogprobs(plan, faulty_slot, result);
  }
  Choose(plan, faulty_slot, result);
  return result;
}

SimPrefix& SimulatedSteps::PrefixOf(int slot, int end) {
  SimPrefix& prefix = prefixes_[slot];
  prefix.AppendUpTo(slots_.token_ids(slot), end);
  return prefix;
}

int32_t SimulatedSteps::NextToken(const SimPrefix& prefix) const {
  return prefix.NextToken(options_.slots.vocab_size, options_.eos_token_ids);
}

void SimulatedSteps::ReportPromptLogprobs(const StepPlan& plan, std::optional<int> faulty_slot,
                                          v1::StepResult& result) {
  v1::SlotLogprobs* current = nullptr;
  for (const StepPlan::PromptRow& row : plan.prompt_rows) {
    if (row.slot == faulty_slot) continue;
    if (current == nullptr || current->slot() != static_cast<uint32_t>(row.slot)) {
      current = result.add_prompt_logprobs();
      current->set_slot(row.slot);
    }
    WriteLogprobs(
        row.token_id, NextToken(PrefixOf(row.slot, row.position)), options_.slots.vocab_size,
        slots_.sampling(row.slot).num_prompt_logprobs.value_or(0), *current->add_logprobs());
  }
}

void SimulatedSteps::Choose(const StepPlan& plan, std::optional<int> faulty_slot,
                            v1::StepResult& result) {
  for (const StepPlan::SampledRow& row : plan.sampled) {
    if (row.slot == faulty_slot) {
      slots_.MarkFault(row.slot);
      if (options_.rank == 0) AddFault(row.slot, "it was to have a fault", result);
      continue;
    }
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

}  // namespace fathom
