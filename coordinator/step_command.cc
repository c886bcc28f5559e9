#include "coordinator/step_command.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "proto/grammar_fault.h"

namespace fathom {
namespace {

absl::Status Wrong(const Step& step, const std::string& what) {
  return absl::InternalError(absl::StrCat("the result of step ", step.number, " ", what));
}

// Batch index by slot. Made when first needed: an ordinary result comes in batch order.
class BatchIndex {
 public:
  explicit BatchIndex(const Step& step) : step_(step) {}

  absl::StatusOr<size_t> Of(uint32_t slot) {
    if (index_of_slot_.empty()) MakeIndex();
    if (slot >= index_of_slot_.size() || index_of_slot_[slot] == kNone) {
      return Wrong(step_, absl::StrCat("names slot ", slot, ", which was not scheduled"));
    }
    return index_of_slot_[slot];
  }

 private:
  static constexpr int kNone = -1;

  void MakeIndex() {
    int highest_slot = -1;
    for (const ScheduledSequence& s : step_.scheduled) {
      highest_slot = std::max(highest_slot, s.slot);
    }
    index_of_slot_.resize(highest_slot + 1, kNone);
    for (size_t i = 0; i < step_.scheduled.size(); ++i) {
      index_of_slot_[step_.scheduled[i].slot] = static_cast<int>(i);
    }
  }

  const Step& step_;
  std::vector<int> index_of_slot_;  // up to the highest one that was scheduled
};

absl::Status TakeFaults(const Step& step, BatchIndex& batch, const v1::StepResult& result,
                        StepAnswer& answer) {
  for (const v1::SlotFault& fault : result.faults()) {
    ASSIGN_OR_RETURN(const size_t i, batch.Of(fault.slot()));
    SequenceOutcome& outcome = answer.outcome.sequences[i];
    if (outcome.fault != nullptr) {
      return Wrong(step, absl::StrCat("has two faults of slot ", fault.slot()));
    }
    absl::Status why(
        fault.is_of_request() ? absl::StatusCode::kInvalidArgument : absl::StatusCode::kInternal,
        fault.reason());
    if (fault.is_of_grammar()) why = OfGrammar(std::move(why));
    outcome.fault = std::make_unique<absl::Status>(std::move(why));
  }
  return absl::OkStatus();
}

absl::Status TakeTokens(const Step& step, BatchIndex& batch, uint32_t vocab_size,
                        const v1::StepResult& result, StepAnswer& answer) {
  if (result.sampled_slots_size() != result.sampled_token_ids_size()) {
    return Wrong(step, absl::StrCat("has ", result.sampled_slots_size(), " slots and ",
                                    result.sampled_token_ids_size(), " tokens"));
  }
  size_t next = 0;
  for (int k = 0; k < result.sampled_slots_size(); ++k) {
    const uint32_t slot = result.sampled_slots(k);
    const uint32_t token_id = result.sampled_token_ids(k);
    size_t i = next++;
    if (i >= step.scheduled.size() || static_cast<uint32_t>(step.scheduled[i].slot) != slot) {
      ASSIGN_OR_RETURN(i, batch.Of(slot));
      next = i + 1;
    }
    SequenceOutcome& outcome = answer.outcome.sequences[i];
    if (!step.scheduled[i].samples || outcome.fault || outcome.sampled_token_id) {
      return Wrong(step, absl::StrCat("has a token too many for slot ", slot));
    }
    if (token_id >= vocab_size) {
      return Wrong(step, absl::StrCat("has token ", token_id, " for slot ", slot,
                                      ", expected less than ", vocab_size));
    }
    outcome.sampled_token_id = token_id;
  }
  for (size_t i = 0; i < step.scheduled.size(); ++i) {
    const SequenceOutcome& outcome = answer.outcome.sequences[i];
    if (step.scheduled[i].samples && !outcome.fault && !outcome.sampled_token_id) {
      return Wrong(step, absl::StrCat("lacks the token of slot ", step.scheduled[i].slot));
    }
  }
  return absl::OkStatus();
}

absl::Status TakeLogprobs(const Step& step, BatchIndex& batch,
                          google::protobuf::RepeatedPtrField<v1::SlotLogprobs>& from,
                          std::vector<v1::SlotLogprobs>& to) {
  if (!from.empty()) to.resize(step.scheduled.size());
  for (v1::SlotLogprobs& logprobs : from) {
    ASSIGN_OR_RETURN(const size_t i, batch.Of(logprobs.slot()));
    to[i].set_slot(logprobs.slot());
    to[i].mutable_logprobs()->MergeFrom(logprobs.logprobs());
  }
  return absl::OkStatus();
}

absl::Status CheckLogprobs(const Step& step, const StepAnswer& answer) {
  for (size_t i = 0; i < step.scheduled.size(); ++i) {
    const ScheduledSequence& scheduled = step.scheduled[i];
    if (answer.outcome.sequences[i].fault) continue;
    const int wanted = scheduled.samples && scheduled.wants_logprobs ? 1 : 0;
    const int got = answer.logprobs.empty() ? 0 : answer.logprobs[i].logprobs_size();
    const int got_of_prompt =
        answer.prompt_logprobs.empty() ? 0 : answer.prompt_logprobs[i].logprobs_size();
    if (got != wanted || got_of_prompt != scheduled.num_prompt_logprobs) {
      return Wrong(step, absl::StrCat("has ", got, " logprobs and ", got_of_prompt,
                                      " prompt logprobs for slot ", scheduled.slot, ", expected ",
                                      wanted, " and ", scheduled.num_prompt_logprobs));
    }
  }
  return absl::OkStatus();
}

}  // namespace

v1::StepCommand EncodeStep(const Step& step, uint64_t epoch) {
  v1::StepCommand command;
  command.set_epoch(epoch);
  command.set_step(step.number);
  for (const int slot : step.released_slots) command.add_released_slots(slot);
  for (const AdmittedSequence& admitted : step.admitted) {
    const Sequence& sequence = *admitted.sequence;
    v1::SequenceAdmission& admission = *command.add_admitted();
    admission.set_slot(sequence.slot);
    for (const absl::Span<const uint32_t> piece : sequence.tokens.pieces()) {
      admission.mutable_token_ids()->Add(piece.begin(), piece.end());
    }
    admission.set_num_prompt_tokens(sequence.request->num_prompt_tokens());
    admission.set_num_computed(admitted.num_computed);
    *admission.mutable_sampling() = sequence.request->sampling;
    admission.set_num_prompt_logprobs_done(sequence.num_prompt_logprobs_done);
  }
  const auto num_sequences = static_cast<int>(step.scheduled.size());
  command.mutable_slots()->Reserve(num_sequences);
  command.mutable_num_tokens()->Reserve(num_sequences);
  command.mutable_num_new_blocks()->Reserve(num_sequences);
  for (const ScheduledSequence& scheduled : step.scheduled) {
    command.add_slots(scheduled.slot);
    command.add_num_tokens(scheduled.num_tokens);
    command.add_num_new_blocks(scheduled.num_new_blocks);
  }
  command.mutable_new_block_ids()->Add(step.new_block_ids.begin(), step.new_block_ids.end());
  return command;
}

absl::StatusOr<StepAnswer> DecodeResult(const Step& step, uint32_t vocab_size,
                                        v1::StepResult result) {
  if (result.step() != step.number) {
    return Wrong(step, absl::StrCat("is of step ", result.step()));
  }
  StepAnswer answer;
  // One that says it took an hour tells nothing worth learning.
  constexpr uint64_t kMostMicroseconds = 3'600'000'000;
  if (result.compute_us() <= kMostMicroseconds) {
    answer.outcome.compute_us = static_cast<double>(result.compute_us());
  }
  answer.outcome.sequences.resize(step.scheduled.size());

  BatchIndex batch(step);
  RETURN_IF_ERROR(TakeFaults(step, batch, result, answer));
  RETURN_IF_ERROR(TakeTokens(step, batch, vocab_size, result, answer));
  RETURN_IF_ERROR(
      TakeLogprobs(step, batch, *result.mutable_prompt_logprobs(), answer.prompt_logprobs));
  RETURN_IF_ERROR(TakeLogprobs(step, batch, *result.mutable_logprobs(), answer.logprobs));
  RETURN_IF_ERROR(CheckLogprobs(step, answer));
  return answer;
}

}  // namespace fathom
