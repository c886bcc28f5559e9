// What a worker process computes with, as its service sees it: a shard of a model (ShardKeeper and
// its StepRunner) or the imitation of one (SimulatedKeeper and its SimulatedRunner).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "grammar/grammar.h"
#include "kernels/device.h"
#include "worker/communicator.h"
#include "worker/memory_plan.h"
#include "worker/model_config.h"
#include "worker/slot_table.h"
#include "worker/weight_loader.h"

namespace fathom {

namespace v1 {
class DescribeResponse;
class ShardSpec;
class StepCommand;
class StepResult;
}  // namespace v1

// The making of one epoch's steps.
class StepMaker {
 public:
  virtual ~StepMaker() = default;

  virtual uint64_t epoch() const = 0;

  // Makes one step, whose command came at `arrived`. After an error it is of no further use:
  //   FailedPrecondition  the command is of another epoch
  //   InvalidArgument     the command is wrong
  //   Aborted             Abort() was called, or a collective failed; says which rank
  // Not thread-safe.
  virtual absl::StatusOr<v1::StepResult> Run(const v1::StepCommand& command,
                                             absl::Time arrived) = 0;

  // Makes the step that is running, and all later ones, end soon. From any thread.
  virtual void Abort() = 0;
};

// One Join, as far as the host of the shard has to do with it. It calls what it needs, in this
// order.
struct ShardJoin {
  uint64_t epoch = 0;
  const v1::ShardSpec& shard;
  int num_kv_blocks = 0;  // at most what Plan(shard) said
  LoadProgress on_loading;
  std::function<void()> on_loaded;
  // Waits for all ranks to get here and connects them; or only waits.
  std::function<absl::StatusOr<std::unique_ptr<Communicator>>(Device&)> connect;
  std::function<absl::Status()> await_others;
};

// FailedPrecondition when the command is of another epoch, InvalidArgument when it is not the one
// after `last_step`.
absl::Status CheckStepOrder(const v1::StepCommand& command, uint64_t epoch, uint64_t last_step);

class ShardHost {
 public:
  virtual ~ShardHost() = default;

  // Thread-safe.
  // Fills in everything but `version` and the plan.
  virtual void Describe(v1::DescribeResponse& response) const = 0;
  // InvalidArgument names the field of `spec` that is out of range; else as PlanWorkerMemory.
  virtual absl::StatusOr<WorkerMemoryPlan> Plan(const v1::ShardSpec& spec) const = 0;

  // Makes sequences that obey the grammar quick to admit: GrammarKeeper::Prepare.
  // FailedPrecondition before rank 0 has joined, InvalidArgument where there are no grammars.
  virtual absl::Status PrepareGrammar(const Grammar& grammar) = 0;

  // Not thread-safe: one Join at a time. REQUIRES: what it gave before is gone.
  virtual absl::StatusOr<std::shared_ptr<StepMaker>> Join(const ShardJoin& join) = 0;
};

// Whether every field of `spec` is within limits that are far above any real use, and keep products
// within 64 bits and memory in reason: InvalidArgument names the first that is not.
absl::Status CheckShardSpec(const v1::ShardSpec& spec);
// The limits on commands for such a shard. REQUIRES: CheckShardSpec(spec) is OK.
SlotTableOptions SlotLimitsOf(const v1::ShardSpec& spec, const ModelConfig& config,
                              int num_kv_blocks);

}  // namespace fathom
