// The workers of one group as processes on machines, and the network to them.
//
// They speak the real protocol: commands go through the real SlotTable, tokens are the hashes of
// sim_token, and rank 0 keeps a KvOracle; a command that a worker must refuse is a failure of the
// run. Messages take their time. Within a stream they keep their order, between streams they do
// not. Processes die and come back empty, fall silent, are slow; results come twice, from an epoch
// that is over, or spoiled.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "coordinator/group_plan.h"
#include "coordinator/worker_group.h"
#include "proto/worker.pb.h"
#include "tests/simulation/kv_oracle.h"
#include "tests/simulation/world.h"
#include "worker/simulated_steps.h"

namespace fathom {

class SimulatedCluster {
 public:
  // Each is a probability, per step and worker unless it says otherwise.
  struct FaultRates {
    double death = 0;
    double silence = 0;
    double slowness = 0;
    double stream_error = 0;
    double duplicate = 0;
    double stale = 0;
    double spoiled = 0;         // rank 0's result
    double sequence_fault = 0;  // per step
    double join_failure = 0;    // per attempt to form a group
    double other_capacity = 0;  // per attempt: the workers have room for more or less than before
  };
  struct Options {
    int num_workers = 1;
    GroupPlanOptions plan;
    v1::DescribeResponse description;  // what every worker says of itself
    int max_logit_rows = 0;
    absl::Duration step_timeout = absl::Seconds(1);
    absl::Duration max_step_time = absl::Milliseconds(20);
    absl::Duration max_delay = absl::Milliseconds(1);  // of a message
    FaultRates faults;
  };
  // What the run is told, at once.
  struct Listener {
    std::function<void(const v1::StepCommand&)> on_step_sent;
    std::function<uint64_t(uint64_t seed)> salt_of;
    std::function<void(uint64_t seed)> on_sequence_fault;
    std::function<bool(uint64_t seed)> is_poison;  // the worker that takes it up dies
  };

  // `world` outlives this.
  SimulatedCluster(Options options, World& world, Listener listener);
  ~SimulatedCluster();

  // Calls `on_formed` when the group has formed or could not. One at a time.
  using OnFormed = std::function<void(absl::StatusOr<std::unique_ptr<WorkerGroup>>)>;
  void Form(uint64_t last_epoch, std::function<void()> on_event, OnFormed on_formed);
  // The one that is being formed ends with Cancelled.
  void CancelForming();

  // From now on everything works.
  void StopFaults() { options_.faults = {}; }
  void KillSomeone();

 private:
  struct Process;
  struct Membership;
  struct Forming;
  class Transport;

  absl::Duration Delay();
  void DescribeAll();
  void JoinAll(std::shared_ptr<Forming> forming, GroupPlan plan, uint64_t epoch);
  void EndForming(absl::StatusOr<std::unique_ptr<WorkerGroup>> group);

  void Send(const std::shared_ptr<Membership>& membership, const v1::StepCommand& command);
  void ReceiveCommand(const std::shared_ptr<Membership>& membership, int rank,
                      const std::shared_ptr<const v1::StepCommand>& command);
  void FinishStep(const std::shared_ptr<Membership>& membership, int rank,
                  const v1::StepCommand& command, absl::Duration duration);
  bool MisbehaveInstead(const std::shared_ptr<Membership>& membership, int rank);
  v1::StepResult Compute(int rank, const v1::StepCommand& command);
  std::optional<int> ChooseFaultySlot(const StepPlan& plan);
  void Spoil(v1::StepResult& result);
  void SendResult(const std::shared_ptr<Membership>& membership, int rank, v1::StepResult result);
  void EndStream(const std::shared_ptr<Membership>& membership, int rank, absl::Status status);
  void Abort(uint64_t epoch);

  void Die(int rank);
  bool IsIn(const Membership& membership, int rank) const;

  Options options_;
  World& world_;
  const Listener listener_;
  std::vector<std::unique_ptr<Process>> processes_;  // by rank
  std::shared_ptr<Membership> membership_;           // of the latest epoch
  std::shared_ptr<Forming> forming_;
};

}  // namespace fathom
