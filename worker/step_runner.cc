#include "worker/step_runner.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/types/span.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "proto/grammar_fault.h"
#include "proto/worker.pb.h"

namespace fathom {
namespace {

void Write(const TokenLogprobs& from, v1::TokenLogprobs& to) {
  to.set_token_id(from.token_id);
  to.set_logprob(from.logprob);
  to.set_rank(from.rank);
  to.mutable_top_token_ids()->Add(from.top_token_ids.begin(), from.top_token_ids.end());
  to.mutable_top_logprobs()->Add(from.top_logprobs.begin(), from.top_logprobs.end());
}

void AddFault(int slot, const absl::Status& status, v1::StepResult& result) {
  v1::SlotFault& fault = *result.add_faults();
  fault.set_slot(slot);
  fault.set_reason(std::string(status.message()));
  fault.set_is_of_request(absl::IsInvalidArgument(status));
  fault.set_is_of_grammar(IsOfGrammar(status));
}

bool HasFault(const v1::StepResult& result, int slot) {
  return std::any_of(
      result.faults().begin(), result.faults().end(),
      [slot](const v1::SlotFault& fault) { return fault.slot() == static_cast<uint32_t>(slot); });
}

}  // namespace

StepRunner::StepRunner(uint64_t epoch, const SlotTableOptions& slots, ModelShard& shard,
                       std::unique_ptr<KvCache> kv_cache,
                       std::unique_ptr<Communicator> communicator,
                       std::unique_ptr<DeviceSampler> device_sampler, GrammarKeeper* grammars)
    : epoch_(epoch),
      vocab_size_(slots.vocab_size),
      shard_(shard),
      kv_cache_(std::move(kv_cache)),
      communicator_(std::move(communicator)),
      device_sampler_(std::move(device_sampler)),
      slots_(slots),
      grammar_masks_(grammars, slots.vocab_size, slots.max_sequences),
      sampler_(slots.vocab_size) {}

absl::StatusOr<v1::StepResult> StepRunner::Run(const v1::StepCommand& command,
                                               absl::Time /*arrived*/) {
  RETURN_IF_ERROR(CheckStepOrder(command, epoch_, last_step_));
  last_step_ = command.step();
  v1::StepResult result;
  result.set_epoch(epoch_);
  result.set_step(command.step());
  const absl::Time start = absl::Now();
  const absl::Status status = MakeStep(command, result);
  if (!status.ok()) {
    // What a collective says of another rank must not look as if this worker were unavailable.
    const bool is_command = absl::IsInvalidArgument(status);
    return absl::Status(is_command ? status.code() : absl::StatusCode::kAborted,
                        absl::StrCat("rank ", rank(), ", step ", command.step(), " of epoch ",
                                     epoch_, ": ", status.message()));
  }
  result.set_compute_us(absl::ToInt64Microseconds(absl::Now() - start));
  return result;
}

absl::Status StepRunner::MakeStep(const v1::StepCommand& command, v1::StepResult& result) {
  ASSIGN_OR_RETURN(const StepPlan plan, slots_.Apply(command));
  if (rank() == 0) {
    UpdateGrammars(command);
    for (const int slot : plan.slots_with_faults) {
      AddFault(slot, absl::InternalError("it had a fault in an earlier step"), result);
    }
  }
  if (plan.batch.num_tokens() == 0) return absl::OkStatus();
  ASSIGN_OR_RETURN(const Tensor logits, shard_.Forward(plan.batch, *kv_cache_, *communicator_));

  Choices choices(plan.sampled.size(), kFault);
  if (rank() == 0) {
    ReportPromptLogprobs(plan, logits, result);
    Choose(plan, logits, choices, result);
  }
  // Whoever has read a result of the device knows by now whether the sums before it were made.
  RETURN_IF_ERROR(communicator_->status());
  if (choices.empty()) return absl::OkStatus();
  RETURN_IF_ERROR(communicator_->BroadcastFromRank0(
      choices.data(), static_cast<int64_t>(choices.size() * sizeof(choices[0]))));
  for (size_t i = 0; i < choices.size(); ++i) {
    if (choices[i] == kFault) {
      slots_.MarkFault(plan.sampled[i].slot);
      continue;
    }
    if (choices[i] < 0 || choices[i] >= vocab_size_) {
      return absl::InternalError(absl::StrCat("rank 0 sent token ", choices[i]));
    }
    slots_.AppendSampledToken(plan.sampled[i].slot, choices[i]);
    if (rank() == 0) grammar_masks_.OnToken(plan.sampled[i].slot, choices[i]);
  }
  return absl::OkStatus();
}

void StepRunner::UpdateGrammars(const v1::StepCommand& command) {
  for (const uint32_t slot : command.released_slots()) {
    grammar_masks_.Release(static_cast<int>(slot));
  }
  for (const v1::SequenceAdmission& admission : command.admitted()) {
    const auto slot = static_cast<int>(admission.slot());
    grammar_masks_.Admit(slot, slots_.sampling(slot),
                         slots_.token_ids(slot).subspan(admission.num_prompt_tokens()));
  }
}

absl::StatusOr<SamplingContext> StepRunner::ContextOf(int slot) {
  SamplingContext context = slots_.ContextOf(slot);
  ASSIGN_OR_RETURN(context.allowed, grammar_masks_.MaskOf(slot));
  return context;
}

void StepRunner::ReportPromptLogprobs(const StepPlan& plan, const Tensor& logits,
                                      v1::StepResult& result) {
  v1::SlotLogprobs* current = nullptr;
  for (const StepPlan::PromptRow& row : plan.prompt_rows) {
    if (HasFault(result, row.slot)) continue;
    const int num_top = slots_.sampling(row.slot).num_prompt_logprobs.value_or(0);
    const absl::StatusOr<TokenLogprobs> logprobs = sampler_.Logprobs(
        device_sampler_->Row(logits, row.logit_row), row.token_id, num_top, row.position);
    const bool continues = current != nullptr && current->slot() == static_cast<uint32_t>(row.slot);
    if (!logprobs.ok()) {
      if (continues) result.mutable_prompt_logprobs()->RemoveLast();
      current = nullptr;
      AddFault(row.slot, logprobs.status(), result);
      continue;
    }
    if (!continues) {
      current = result.add_prompt_logprobs();
      current->set_slot(row.slot);
    }
    Write(*logprobs, *current->add_logprobs());
  }
}

StepRunner::Choices StepRunner::ChoosePlain(const StepPlan& plan, const Tensor& logits) {
  std::vector<SamplingRow> rows;
  std::vector<size_t> places;
  for (size_t i = 0; i < plan.sampled.size(); ++i) {
    const absl::StatusOr<SamplingContext> context = ContextOf(plan.sampled[i].slot);
    if (!context.ok() || !Sampler::IsPlain(*context)) continue;
    rows.push_back(Sampler::RowOf(*context));
    rows.back().logit_row = plan.sampled[i].logit_row;
    places.push_back(i);
  }
  Choices choices(plan.sampled.size(), kFault);
  const absl::Span<const int32_t> tokens = device_sampler_->Sample(logits, rows);
  for (size_t i = 0; i < places.size(); ++i) choices[places[i]] = tokens[i];
  return choices;
}

void StepRunner::Choose(const StepPlan& plan, const Tensor& logits, Choices& choices,
                        v1::StepResult& result) {
  const Choices plain = ChoosePlain(plan, logits);
  for (size_t i = 0; i < plan.sampled.size(); ++i) {
    const auto& [slot, logit_row] = plan.sampled[i];
    if (HasFault(result, slot)) continue;
    const absl::StatusOr<SamplingContext> found = ContextOf(slot);
    if (!found.ok()) {
      AddFault(slot, found.status(), result);
      continue;
    }
    const SamplingContext& context = *found;
    absl::StatusOr<int32_t> token_id = plain[i];
    if (!Sampler::IsPlain(context)) {
      token_id = sampler_.Sample(device_sampler_->Row(logits, logit_row), context);
    } else if (plain[i] == kFault) {
      token_id = Sampler::NotFinite(context.position);
    }
    if (!token_id.ok()) {
      AddFault(slot, token_id.status(), result);
      continue;
    }
    choices[i] = *token_id;
    result.add_sampled_slots(slot);
    result.add_sampled_token_ids(*token_id);
    if (!context.params.num_logprobs.has_value()) continue;
    const absl::StatusOr<TokenLogprobs> logprobs =
        sampler_.Logprobs(device_sampler_->Row(logits, logit_row), *token_id,
                          *context.params.num_logprobs, context.position);
    CHECK(logprobs.ok()) << logprobs.status();  // the row was found finite just now
    v1::SlotLogprobs& report = *result.add_logprobs();
    report.set_slot(slot);
    Write(*logprobs, *report.add_logprobs());
  }
}

}  // namespace fathom
