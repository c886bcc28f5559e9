#include "worker/slot_table.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "proto/worker.pb.h"

namespace fathom {
namespace {

template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

}  // namespace

SlotTable::SlotTable(const SlotTableOptions& options)
    : options_(options), slots_(options.max_sequences) {
  CHECK(options.vocab_size > 0 && options.max_sequences > 0 && options.max_model_len > 0);
  CHECK(options.max_tokens_per_step > 0 && options.max_logit_rows > 0);
  CHECK(options.block_size > 0 && options.num_kv_blocks > 0);
  CHECK_LE(options.num_kv_blocks, INT32_MAX / options.block_size) << "places are 32 bits";
}

absl::StatusOr<StepPlan> SlotTable::Apply(const v1::StepCommand& command) {
  ++num_steps_;
  for (const uint32_t slot : command.released_slots()) RETURN_IF_ERROR(Release(slot));
  for (const v1::SequenceAdmission& admission : command.admitted()) {
    RETURN_IF_ERROR(Admit(admission));
  }
  StepPlan plan;
  RETURN_IF_ERROR(Schedule(command, plan));
  return plan;
}

absl::StatusOr<SlotTable::Sequence*> SlotTable::Find(uint32_t slot) {
  if (slot >= slots_.size()) {
    return Invalid("slot ", slot, " is out of range, there are ", slots_.size());
  }
  if (!slots_[slot].has_value()) return Invalid("slot ", slot, " holds no sequence");
  return &*slots_[slot];
}

absl::Status SlotTable::Release(uint32_t slot) {
  RETURN_IF_ERROR(Find(slot).status());
  slots_[slot].reset();
  return absl::OkStatus();
}

absl::Status SlotTable::Admit(const v1::SequenceAdmission& admission) {
  const uint32_t slot = admission.slot();
  if (slot >= slots_.size()) {
    return Invalid("slot ", slot, " is out of range, there are ", slots_.size());
  }
  if (slots_[slot].has_value()) return Invalid("slot ", slot, " is already taken");
  const auto num_tokens = static_cast<uint32_t>(admission.token_ids_size());
  if (num_tokens == 0 || num_tokens > static_cast<uint32_t>(options_.max_model_len)) {
    return Invalid("slot ", slot, ": ", num_tokens, " tokens, expected 1 to ",
                   options_.max_model_len);
  }
  if (admission.num_prompt_tokens() == 0 || admission.num_prompt_tokens() > num_tokens) {
    return Invalid("slot ", slot, ": num_prompt_tokens is ", admission.num_prompt_tokens(),
                   ", expected 1 to ", num_tokens);
  }
  if (admission.num_computed() >= num_tokens) {
    return Invalid("slot ", slot, ": num_computed is ", admission.num_computed(), " of ",
                   num_tokens, " tokens, expected fewer");
  }
  if (admission.num_prompt_logprobs_done() > admission.num_prompt_tokens()) {
    return Invalid("slot ", slot, ": num_prompt_logprobs_done is ",
                   admission.num_prompt_logprobs_done(), " of ", admission.num_prompt_tokens(),
                   " prompt tokens");
  }
  const auto& ids = admission.token_ids();
  const auto wrong = std::find_if(ids.begin(), ids.end(), [&](uint32_t id) {
    return id >= static_cast<uint32_t>(options_.vocab_size);
  });
  if (wrong != ids.end()) {
    return Invalid("slot ", slot, ": token id ", *wrong, " at position ", wrong - ids.begin(),
                   ", but the vocabulary has ", options_.vocab_size, " tokens");
  }

  Sequence sequence;
  ASSIGN_OR_RETURN(sequence.sampling,
                   ParseSamplingParams(admission.sampling(), options_.vocab_size));
  if (!admission.sampling().has_seed() && !sequence.sampling.greedy()) {
    return Invalid("slot ", slot, ": sampling has no seed");
  }
  sequence.token_ids.assign(ids.begin(), ids.end());
  sequence.num_prompt_tokens = static_cast<int>(admission.num_prompt_tokens());
  sequence.num_computed = static_cast<int>(admission.num_computed());
  sequence.num_prompt_logprobs_done = static_cast<int>(admission.num_prompt_logprobs_done());
  if (sequence.sampling.has_penalties()) {
    for (int i = 0; i < static_cast<int>(num_tokens); ++i) {
      if (i < sequence.num_prompt_tokens) {
        sequence.counts.AddPromptToken(sequence.token_ids[i]);
      } else {
        sequence.counts.AddOutputToken(sequence.token_ids[i]);
      }
    }
  }
  slots_[slot] = std::move(sequence);
  return absl::OkStatus();
}

absl::Status SlotTable::Schedule(const v1::StepCommand& command, StepPlan& plan) {
  const int num_sequences = command.slots_size();
  if (command.num_tokens_size() != num_sequences ||
      command.num_new_blocks_size() != num_sequences) {
    return Invalid("slots has ", num_sequences, " entries, num_tokens ", command.num_tokens_size(),
                   " and num_new_blocks ", command.num_new_blocks_size());
  }
  const uint64_t num_new_blocks = std::accumulate(command.num_new_blocks().begin(),
                                                  command.num_new_blocks().end(), uint64_t{0});
  if (num_new_blocks != static_cast<uint64_t>(command.new_block_ids_size())) {
    return Invalid("num_new_blocks add up to ", num_new_blocks, ", but there are ",
                   command.new_block_ids_size(), " new_block_ids");
  }
  const uint64_t num_tokens =
      std::accumulate(command.num_tokens().begin(), command.num_tokens().end(), uint64_t{0});
  if (num_tokens > static_cast<uint64_t>(options_.max_tokens_per_step)) {
    return Invalid("the step has ", num_tokens, " tokens, limit ", options_.max_tokens_per_step);
  }

  std::vector<SequenceSlice> slices;
  const uint32_t* next_blocks = command.new_block_ids().data();
  int row = 0;
  for (int i = 0; i < num_sequences; ++i) {
    const uint32_t slot = command.slots(i);
    ASSIGN_OR_RETURN(Sequence * sequence, Find(slot));
    if (sequence->scheduled_in_step == num_steps_) {
      return Invalid("slot ", slot, " is scheduled twice");
    }
    sequence->scheduled_in_step = num_steps_;
    RETURN_IF_ERROR(AppendBlocks(slot, *sequence, {next_blocks, command.num_new_blocks(i)}));
    next_blocks += command.num_new_blocks(i);
    if (sequence->has_fault) {
      plan.slots_with_faults.push_back(static_cast<int>(slot));
      continue;
    }
    RETURN_IF_ERROR(CheckTokens(slot, *sequence, command.num_tokens(i)));

    const SequenceSlice slice = {.token_ids = sequence->token_ids,
                                 .blocks = sequence->blocks,
                                 .first = sequence->num_computed,
                                 .count = static_cast<int>(command.num_tokens(i))};
    AddLogitRows(static_cast<int>(slot), *sequence, slice, row, plan);
    slices.push_back(slice);
    row += slice.count;
    sequence->num_computed += slice.count;
  }
  if (plan.batch.logit_rows.size() > static_cast<size_t>(options_.max_logit_rows)) {
    return Invalid("the step wants ", plan.batch.logit_rows.size(), " rows of logits, limit ",
                   options_.max_logit_rows);
  }
  std::vector<int32_t> logit_rows = std::move(plan.batch.logit_rows);
  plan.batch = BuildStepBatch(slices, options_.block_size);
  plan.batch.logit_rows = std::move(logit_rows);
  return absl::OkStatus();
}

absl::Status SlotTable::AppendBlocks(uint32_t slot, Sequence& sequence,
                                     absl::Span<const uint32_t> block_ids) {
  const size_t most_blocks =
      (static_cast<size_t>(options_.max_model_len) + options_.block_size - 1) / options_.block_size;
  if (sequence.blocks.size() + block_ids.size() > most_blocks) {
    return Invalid("slot ", slot, " would have ", sequence.blocks.size() + block_ids.size(),
                   " blocks, limit ", most_blocks);
  }
  for (const uint32_t block_id : block_ids) {
    if (block_id >= static_cast<uint32_t>(options_.num_kv_blocks)) {
      return Invalid("slot ", slot, ": block id ", block_id, " is out of range, there are ",
                     options_.num_kv_blocks);
    }
    sequence.blocks.push_back(static_cast<int32_t>(block_id));
  }
  return absl::OkStatus();
}

absl::Status SlotTable::CheckTokens(uint32_t slot, const Sequence& sequence,
                                    uint32_t num_tokens) const {
  const size_t pending = sequence.token_ids.size() - sequence.num_computed;
  if (num_tokens == 0 || num_tokens > pending) {
    return Invalid("slot ", slot, ": num_tokens is ", num_tokens, ", but ", pending,
                   " tokens are to be computed");
  }
  const size_t end = sequence.num_computed + size_t{num_tokens};
  if (end > static_cast<size_t>(options_.max_model_len)) {
    return Invalid("slot ", slot, ": position ", end - 1, " is past the model's length of ",
                   options_.max_model_len);
  }
  const size_t room = sequence.blocks.size() * options_.block_size;
  if (end > room) {
    return Invalid("slot ", slot, ": ", end, " tokens do not fit into ", sequence.blocks.size(),
                   " blocks of ", options_.block_size);
  }
  return absl::OkStatus();
}

void SlotTable::AddLogitRows(int slot, const Sequence& sequence, const SequenceSlice& slice,
                             int first_row, StepPlan& plan) const {
  std::vector<int32_t>& logit_rows = plan.batch.logit_rows;
  const int end = slice.first + slice.count;
  if (sequence.sampling.num_prompt_logprobs.has_value()) {
    // The token at `position` tells of the next one; the first prompt token is told of by none.
    const int last = std::min(end, sequence.num_prompt_tokens - 1);
    for (int position = std::max(slice.first, sequence.num_prompt_logprobs_done); position < last;
         ++position) {
      plan.prompt_rows.push_back({.slot = slot,
                                  .logit_row = static_cast<int>(logit_rows.size()),
                                  .token_id = sequence.token_ids[position + 1],
                                  .position = position + 1});
      logit_rows.push_back(first_row + position - slice.first);
    }
  }
  if (end == static_cast<int>(sequence.token_ids.size())) {
    plan.sampled.push_back({.slot = slot, .logit_row = static_cast<int>(logit_rows.size())});
    logit_rows.push_back(first_row + slice.count - 1);
  }
}

const SamplingParams& SlotTable::sampling(int slot) const {
  CHECK(slots_[slot].has_value()) << "slot " << slot;
  return slots_[slot]->sampling;
}

absl::Span<const int32_t> SlotTable::token_ids(int slot) const {
  CHECK(slots_[slot].has_value()) << "slot " << slot;
  return slots_[slot]->token_ids;
}

SamplingContext SlotTable::ContextOf(int slot) const {
  CHECK(slots_[slot].has_value()) << "slot " << slot;
  const Sequence& sequence = *slots_[slot];
  const auto num_tokens = static_cast<int>(sequence.token_ids.size());
  return {.params = sequence.sampling,
          .counts = sequence.counts,
          .output_token_ids =
              absl::MakeConstSpan(sequence.token_ids).subspan(sequence.num_prompt_tokens),
          .position = num_tokens};
}

void SlotTable::AppendSampledToken(int slot, int32_t token_id) {
  CHECK(slots_[slot].has_value()) << "slot " << slot;
  CHECK(token_id >= 0 && token_id < options_.vocab_size) << "token " << token_id;
  Sequence& sequence = *slots_[slot];
  CHECK_EQ(sequence.num_computed, static_cast<int>(sequence.token_ids.size()));
  sequence.token_ids.push_back(token_id);
  if (sequence.sampling.has_penalties()) sequence.counts.AddOutputToken(token_id);
}

void SlotTable::MarkFault(int slot) {
  CHECK(slots_[slot].has_value()) << "slot " << slot;
  Sequence& sequence = *slots_[slot];
  CHECK_EQ(sequence.num_computed, static_cast<int>(sequence.token_ids.size()));
  sequence.has_fault = true;
}

}  // namespace fathom
