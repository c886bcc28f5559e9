#include "tests/simulation/simulated_cluster.h"

#include <algorithm>
#include <deque>
#include <utility>

#include "absl/strings/str_cat.h"

namespace fathom {

// A worker process. What it knows is lost when it dies.
struct SimulatedCluster::Process {
  bool is_alive = true;
  int incarnation = 0;      // counts its lives
  uint64_t last_epoch = 0;  // that it has heard of
  uint64_t epoch = 0;       // that it is in; 0: none
  bool is_silent = false;   // its step hangs
  absl::Duration busy_until;
  // Of rank 0, in an epoch.
  std::unique_ptr<SimulatedSteps> steps;
  std::unique_ptr<KvOracle> kv;
  std::vector<uint64_t> seeds;  // by slot

  void Leave() {
    epoch = 0;
    is_silent = false;
    steps.reset();
    kv.reset();
  }
};

// The streams of one epoch.
struct SimulatedCluster::Membership {
  uint64_t epoch = 0;
  WorkerGroup* group = nullptr;  // null: the coordinator has hung up
  struct Stream {
    bool is_open = true;
    absl::Duration last_command_at;  // arrives
    absl::Duration last_result_at;
  };
  std::vector<Stream> streams;  // by rank
};

struct SimulatedCluster::Forming {
  uint64_t last_epoch;
  std::function<void()> on_event;
  OnFormed on_formed;
};

class SimulatedCluster::Transport final : public WorkerGroup::Transport {
 public:
  Transport(SimulatedCluster& cluster, std::shared_ptr<Membership> membership)
      : cluster_(cluster), membership_(std::move(membership)) {}
  ~Transport() override {
    membership_->group = nullptr;
    cluster_.Abort(membership_->epoch);
  }
  void Send(const v1::StepCommand& command) override { cluster_.Send(membership_, command); }

 private:
  SimulatedCluster& cluster_;
  const std::shared_ptr<Membership> membership_;
};

SimulatedCluster::SimulatedCluster(Options options, World& world, Listener listener)
    : options_(std::move(options)), world_(world), listener_(std::move(listener)) {
  for (int rank = 0; rank < options_.num_workers; ++rank) {
    processes_.push_back(std::make_unique<Process>());
  }
}

SimulatedCluster::~SimulatedCluster() = default;

absl::Duration SimulatedCluster::Delay() {
  return world_.random.Between(absl::Microseconds(10), options_.max_delay);
}

void SimulatedCluster::Form(uint64_t last_epoch, std::function<void()> on_event,
                            OnFormed on_formed) {
  forming_ = std::make_shared<Forming>(Forming{.last_epoch = last_epoch,
                                               .on_event = std::move(on_event),
                                               .on_formed = std::move(on_formed)});
  DescribeAll();
}

void SimulatedCluster::CancelForming() {
  if (forming_ != nullptr) EndForming(absl::CancelledError("stopping"));
}

void SimulatedCluster::EndForming(absl::StatusOr<std::unique_ptr<WorkerGroup>> group) {
  if (!group.ok()) ++world_.tally.forming_failed;
  const std::shared_ptr<Forming> forming = std::exchange(forming_, nullptr);
  forming->on_formed(std::move(group));
}

// Asks until everyone is there, then plans.
void SimulatedCluster::DescribeAll() {
  world_.clock.After(Delay(), [this, forming = forming_] {
    if (forming != forming_) return;  // cancelled
    const bool all_alive = std::all_of(processes_.begin(), processes_.end(),
                                       [](const auto& process) { return process->is_alive; });
    if (!all_alive) {
      world_.clock.After(absl::Milliseconds(20), [this, forming] {
        if (forming == forming_) DescribeAll();
      });
      return;
    }
    if (world_.random.Chance(options_.faults.other_capacity)) {
      options_.description.mutable_plan()->set_kv_block_capacity(world_.random.Between(2, 60));
    }
    std::vector<v1::DescribeResponse> descriptions;
    std::vector<std::string> addresses;
    for (const auto& process : processes_) {
      descriptions.push_back(options_.description);
      descriptions.back().set_last_epoch(process->last_epoch);
      addresses.push_back("unix:/worker");
    }
    absl::StatusOr<GroupPlan> plan = PlanGroup(options_.plan, descriptions, addresses);
    if (!plan.ok()) return EndForming(plan.status());
    JoinAll(forming, *std::move(plan), NextEpoch(forming->last_epoch, descriptions));
  });
}

void SimulatedCluster::JoinAll(std::shared_ptr<Forming> forming, GroupPlan plan, uint64_t epoch) {
  std::vector<int> incarnations;
  for (const auto& process : processes_) incarnations.push_back(process->incarnation);
  const bool must_fail = world_.random.Chance(options_.faults.join_failure);
  const absl::Duration duration =
      world_.random.Between(absl::Milliseconds(5), absl::Milliseconds(100));
  world_.clock.After(duration, [=, this, plan = std::move(plan)] {
    if (forming != forming_) return;  // cancelled
    auto membership = std::make_shared<Membership>();
    membership->epoch = epoch;
    membership->streams.resize(processes_.size());
    WorkerGroup::Options group_options{
        .epoch = epoch, .plan = plan, .worker_names = {}, .step_timeout = options_.step_timeout};
    for (size_t rank = 0; rank < processes_.size(); ++rank) {
      Process& process = *processes_[rank];
      if (!process.is_alive || process.incarnation != incarnations[rank] ||
          (must_fail && rank == 0)) {
        Abort(epoch);
        return EndForming(absl::UnavailableError(absl::StrCat("worker ", rank, " did not join")));
      }
      if (epoch <= process.last_epoch) world_.Fail("Join with an old epoch");
      process.Leave();
      process.last_epoch = process.epoch = epoch;
      group_options.worker_names.push_back(absl::StrCat("worker ", rank));
    }
    const SlotTableOptions limits{.vocab_size = static_cast<int>(plan.model.vocab_size()),
                                  .max_sequences = plan.max_sequences,
                                  .max_model_len = static_cast<int>(plan.model.max_model_len()),
                                  .max_tokens_per_step = plan.max_tokens_per_step,
                                  .max_logit_rows = options_.max_logit_rows,
                                  .block_size = plan.block_size,
                                  .num_kv_blocks = plan.num_kv_blocks};
    Process& rank0 = *processes_[0];
    const auto& eos = plan.model.eos_token_ids();
    rank0.steps = std::make_unique<SimulatedSteps>(
        SimulatedStepsOptions{.epoch = epoch,
                              .rank = 0,
                              .slots = limits,
                              .eos_token_ids = std::vector<int>(eos.begin(), eos.end())});
    rank0.kv = std::make_unique<KvOracle>(limits, listener_.salt_of);
    rank0.seeds.assign(limits.max_sequences, 0);
    auto group = std::make_unique<WorkerGroup>(std::move(group_options), forming->on_event);
    membership->group = group.get();
    membership_ = membership;
    group->Connect(std::make_unique<Transport>(*this, membership));
    world_.Log("group formed", epoch, plan.num_kv_blocks);
    EndForming(std::move(group));
  });
}

bool SimulatedCluster::IsIn(const Membership& membership, int rank) const {
  return processes_[rank]->is_alive && processes_[rank]->epoch == membership.epoch;
}

void SimulatedCluster::Send(const std::shared_ptr<Membership>& membership,
                            const v1::StepCommand& command) {
  ++world_.tally.steps;
  world_.Log("step sent", command.epoch(), command.step(), command.slots_size());
  listener_.on_step_sent(command);
  const auto shared = std::make_shared<const v1::StepCommand>(command);
  for (int rank = 0; rank < options_.num_workers; ++rank) {
    Membership::Stream& stream = membership->streams[rank];
    if (!stream.is_open) continue;
    stream.last_command_at = std::max(stream.last_command_at, world_.clock.now() + Delay());
    world_.clock.At(stream.last_command_at,
                    [this, membership, rank, shared] { ReceiveCommand(membership, rank, shared); });
  }
}

void SimulatedCluster::ReceiveCommand(const std::shared_ptr<Membership>& membership, int rank,
                                      const std::shared_ptr<const v1::StepCommand>& command) {
  if (!IsIn(*membership, rank)) return;
  Process& process = *processes_[rank];
  if (process.is_silent || MisbehaveInstead(membership, rank)) return;
  for (const v1::SequenceAdmission& admission : command->admitted()) {
    if (rank == 0 && listener_.is_poison(admission.sampling().seed())) {
      ++world_.tally.poisoned;
      return Die(rank);
    }
  }
  absl::Duration duration = world_.random.Between(absl::Microseconds(100), options_.max_step_time);
  if (world_.random.Chance(options_.faults.slowness)) {
    ++world_.tally.slow_steps;
    duration += options_.step_timeout * world_.random.Between(1, 150) / 100;
  }
  process.busy_until = std::max(process.busy_until, world_.clock.now()) + duration;
  world_.clock.At(process.busy_until,
                  [this, membership, rank, command, duration, incarnation = process.incarnation] {
                    if (!IsIn(*membership, rank)) return;
                    if (processes_[rank]->incarnation != incarnation) return;
                    FinishStep(membership, rank, *command, duration);
                  });
}

// True when there will be no result.
bool SimulatedCluster::MisbehaveInstead(const std::shared_ptr<Membership>& membership, int rank) {
  const FaultRates& faults = options_.faults;
  if (world_.random.Chance(faults.death)) {
    Die(rank);
    return true;
  }
  if (world_.random.Chance(faults.silence)) {
    ++world_.tally.silences;
    world_.Log("falls silent", rank);
    processes_[rank]->is_silent = true;
    return true;
  }
  if (world_.random.Chance(faults.stream_error)) {
    processes_[rank]->Leave();
    EndStream(membership, rank, absl::InternalError("out of luck"));
    return true;
  }
  return false;
}

void SimulatedCluster::FinishStep(const std::shared_ptr<Membership>& membership, int rank,
                                  const v1::StepCommand& command, absl::Duration duration) {
  v1::StepResult result = Compute(rank, command);
  result.set_compute_us(absl::ToInt64Microseconds(duration));
  if (rank == 0 && world_.random.Chance(options_.faults.spoiled)) Spoil(result);
  if (world_.random.Chance(options_.faults.stale)) {
    // As if an epoch that is over had got to this step, with other sequences in the slots.
    v1::StepResult stale = result;
    stale.set_epoch(command.epoch() - 1);
    for (uint32_t& token_id : *stale.mutable_sampled_token_ids()) token_id ^= 1;
    ++world_.tally.stale_results;
    SendResult(membership, rank, std::move(stale));
  }
  if (world_.random.Chance(options_.faults.duplicate)) {
    ++world_.tally.duplicates;
    SendResult(membership, rank, result);
  }
  SendResult(membership, rank, std::move(result));
}

v1::StepResult SimulatedCluster::Compute(int rank, const v1::StepCommand& command) {
  v1::StepResult result;
  result.set_epoch(command.epoch());
  result.set_step(command.step());
  if (rank != 0) return result;
  Process& process = *processes_[rank];
  const absl::StatusOr<StepPlan> plan = process.steps->Apply(command);
  if (!plan.ok()) {
    world_.Fail(absl::StrCat("a worker refuses: ", plan.status().message()));
    return result;
  }
  for (const v1::SequenceAdmission& admission : command.admitted()) {
    process.seeds[admission.slot()] = admission.sampling().seed();
  }
  if (const auto wrong = process.kv->Compute(command, *plan, process.steps->slots())) {
    world_.Fail(*wrong);
  }
  return process.steps->Answer(*plan, ChooseFaultySlot(*plan));
}

std::optional<int> SimulatedCluster::ChooseFaultySlot(const StepPlan& plan) {
  if (plan.sampled.empty() || !world_.random.Chance(options_.faults.sequence_fault)) {
    return std::nullopt;
  }
  const int i = world_.random.Between(0, static_cast<int>(plan.sampled.size()) - 1);
  const int slot = plan.sampled[i].slot;
  const uint64_t seed = processes_[0]->seeds[slot];
  world_.Log("sequence fault", seed, slot);
  listener_.on_sequence_fault(seed);
  return slot;
}

void SimulatedCluster::Spoil(v1::StepResult& result) {
  if (result.sampled_slots_size() == 0) return;
  ++world_.tally.spoiled;
  world_.Log("spoiled result", result.step());
  switch (world_.random.Between(0, 4)) {
    case 0:
      result.set_sampled_token_ids(0, UINT32_MAX);
      break;
    case 1:
      result.mutable_sampled_token_ids()->RemoveLast();
      break;
    case 2:
      result.add_sampled_slots(UINT32_MAX);
      result.add_sampled_token_ids(0);
      break;
    case 3:
      result.add_sampled_slots(result.sampled_slots(0));
      result.add_sampled_token_ids(0);
      break;
    default:
      result.add_logprobs()->set_slot(result.sampled_slots(0));
      result.mutable_logprobs()->rbegin()->add_logprobs();
      break;
  }
}

void SimulatedCluster::SendResult(const std::shared_ptr<Membership>& membership, int rank,
                                  v1::StepResult result) {
  Membership::Stream& stream = membership->streams[rank];
  if (!stream.is_open) return;
  stream.last_result_at = std::max(stream.last_result_at, world_.clock.now() + Delay());
  world_.clock.At(stream.last_result_at, [this, membership, rank, result = std::move(result)] {
    if (membership->group == nullptr) return;
    world_.Log("result", rank, result.epoch(), result.step());
    membership->group->OnResult(rank, result);
  });
}

void SimulatedCluster::EndStream(const std::shared_ptr<Membership>& membership, int rank,
                                 absl::Status status) {
  Membership::Stream& stream = membership->streams[rank];
  if (!std::exchange(stream.is_open, false)) return;
  stream.last_result_at = std::max(stream.last_result_at, world_.clock.now() + Delay());
  world_.clock.At(stream.last_result_at, [this, membership, rank, status = std::move(status)] {
    if (membership->group == nullptr) return;
    world_.Log("stream ended", rank, membership->epoch, static_cast<uint64_t>(status.code()));
    membership->group->OnStreamEnded(rank, status);
  });
}

// The coordinator tells everyone to leave. Who hangs in a step exits instead.
void SimulatedCluster::Abort(uint64_t epoch) {
  for (int rank = 0; rank < options_.num_workers; ++rank) {
    world_.clock.After(Delay(), [this, rank, epoch] {
      Process& process = *processes_[rank];
      if (!process.is_alive || process.epoch != epoch) return;
      if (process.is_silent) return Die(rank);
      process.Leave();
    });
  }
}

void SimulatedCluster::KillSomeone() {
  const int rank = world_.random.Between(0, options_.num_workers - 1);
  if (processes_[rank]->is_alive) Die(rank);
}

void SimulatedCluster::Die(int rank) {
  ++world_.tally.deaths;
  world_.Log("dies", rank);
  Process& process = *processes_[rank];
  const uint64_t epoch = process.epoch;
  const int incarnation = process.incarnation + 1;
  process = {};
  process.is_alive = false;
  process.incarnation = incarnation;
  world_.clock.After(world_.random.Between(absl::Milliseconds(20), absl::Seconds(2)),
                     [this, rank] { processes_[rank]->is_alive = true; });
  if (epoch == 0 || membership_ == nullptr || membership_->epoch != epoch) return;
  EndStream(membership_, rank, absl::UnavailableError("connection reset"));
  // The others miss it in their sums.
  for (int other = 0; other < options_.num_workers; ++other) {
    if (other == rank) continue;
    world_.clock.After(Delay(), [this, other, rank, membership = membership_] {
      if (!IsIn(*membership, other)) return;
      processes_[other]->Leave();
      EndStream(membership, other, absl::AbortedError(absl::StrCat("rank ", rank, " is gone")));
    });
  }
}

}  // namespace fathom
