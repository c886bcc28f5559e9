// One step as the scheduler chose it, and what came of it. Plain data, no wire.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/sequence.h"

namespace fathom {

// A sequence that takes a slot in this step; the workers are told all of it.
struct AdmittedSequence {
  const Sequence* sequence;  // valid until the scheduler is called again
  int num_computed;          // before this step
};

struct ScheduledSequence {
  SequenceId id;
  int slot;
  int num_tokens;           // to compute now
  int num_new_blocks;       // of Step::new_block_ids, in batch order
  int num_prompt_logprobs;  // rows of prompt logprobs that come of it
  bool samples;             // all its tokens are then computed, so the next one is sampled
  bool wants_logprobs;      // of the sampled token
  int first_token;          // position of the first token computed
  int admission;            // Sequence::num_admissions when it was scheduled
};

struct Step {
  uint64_t number = 0;  // counts from 1
  std::vector<int> released_slots;
  std::vector<AdmittedSequence> admitted;
  std::vector<ScheduledSequence> scheduled;  // in batch order
  std::vector<int32_t> new_block_ids;
  int num_tokens = 0;
  int num_prefill_tokens = 0;  // of them: of sequences with more than one to compute

  // Nothing to compute: such a step is not sent, and what it would have released waits.
  bool empty() const { return scheduled.empty(); }
};

// What the workers made of one scheduled sequence.
struct SequenceOutcome {
  std::optional<uint32_t> sampled_token_id;   // set iff it samples and has no fault
  std::unique_ptr<const absl::Status> fault;  // set iff the sequence must end: why
};

struct StepOutcome {
  double compute_us = 0;                   // that the workers took; 0: unknown
  std::vector<SequenceOutcome> sequences;  // parallel to Step::scheduled
};

}  // namespace fathom
