// One step on the wire: Step → StepCommand, and StepResult → what became of it.
//
// The only place where the scheduler's world meets worker.proto. Pure functions, thread-safe.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/step.h"
#include "proto/worker.pb.h"

namespace fathom {

// The message that all workers get: released slots, the full state of each admitted sequence, and
// packed deltas of the scheduled ones.
v1::StepCommand EncodeStep(const Step& step, uint64_t epoch);

struct StepAnswer {
  StepOutcome outcome;
  // Parallel to Step::scheduled and empty where nothing was asked for, or, as in nearly every step,
  // without elements because no sequence has any.
  std::vector<v1::SlotLogprobs> prompt_logprobs;
  std::vector<v1::SlotLogprobs> logprobs;
};

// Takes rank 0's result of `step` apart. Internal, naming what is wrong, when it does not answer
// that step in full (a slot that was not scheduled, a missing token, an id beyond the vocabulary,
// too few logprobs): that worker cannot be trusted, and its group must form again.
absl::StatusOr<StepAnswer> DecodeResult(const Step& step, uint32_t vocab_size,
                                        v1::StepResult result);

}  // namespace fathom
