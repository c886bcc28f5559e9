// Steps without a model and without time: commands are checked and mirrored as by StepRunner, and
// tokens are hashes of what stands before them (sim_token).
//
// Ranks exchange nothing: all compute the same tokens, and rank 0 reports them. Sampling parameters
// are checked and change nothing. Not thread-safe.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/sim_token.h"
#include "worker/slot_table.h"

namespace fathom {

namespace v1 {
class StepCommand;
class StepResult;
}  // namespace v1

struct SimulatedStepsOptions {
  uint64_t epoch = 0;
  int rank = 0;
  SlotTableOptions slots = {};
  std::vector<int> eos_token_ids = {};  // ascending; not all tokens
};

class SimulatedSteps {
 public:
  explicit SimulatedSteps(SimulatedStepsOptions options);

  // What the command asks for. Errors as of StepMaker::Run.
  absl::StatusOr<StepPlan> Apply(const v1::StepCommand& command);

  // Its tokens and logprobs, epoch and step. `faulty_slot`, one of those that sample, has a fault
  // instead. REQUIRES: `plan` is of the last Apply.
  v1::StepResult Answer(const StepPlan& plan, std::optional<int> faulty_slot = std::nullopt);

  const SlotTable& slots() const { return slots_; }
  uint64_t last_step() const { return last_step_; }

 private:
  // Of a slot, up to the last position that was asked about.
  SimPrefix& PrefixOf(int slot, int end);
  int32_t NextToken(const SimPrefix& prefix) const;
  void ReportPromptLogprobs(const StepPlan& plan, std::optional<int> faulty_slot,
                            v1::StepResult& result);
  void Choose(const StepPlan& plan, std::optional<int> faulty_slot, v1::StepResult& result);

  const SimulatedStepsOptions options_;
  SlotTable slots_;
  std::vector<SimPrefix> prefixes_;  // by slot
  uint64_t last_step_ = 0;
};

}  // namespace fathom
