#include "tests/simulation/simulation.h"

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "coordinator/admission.h"
#include "coordinator/group_router.h"
#include "tests/simulation/simulated_client.h"
#include "tests/simulation/simulated_loop.h"

namespace fathom {
namespace {

// How many later requests of a loop may be admitted before one that waits there.
constexpr int kMaxOvertakers = 0;

// A run is over long before.
constexpr int64_t kMostEvents = 2'000'000;
constexpr absl::Duration kLongestRun = absl::Hours(1);

class Simulation {
 public:
  Simulation(uint64_t seed, Metrics& metrics);
  SimulationResult Run();
  std::string last_events() const { return world_.log.Tail(); }

 private:
  static constexpr int kNowhere = -1;
  // A request on its way, and where it is.
  struct Live {
    std::shared_ptr<SimulatedClient> client;
    RequestId request_id = 0;
    std::weak_ptr<const Request> request = {};
    int loop = kNowhere;  // or with the router
    absl::Duration queued_at = {};
    SequenceId id = 0;         // in that loop
    bool is_admitted = false;  // by the group that it is in now
    int num_overtakers = 0;
    bool is_poison = false;  // to workers
    int num_losses = 0;      // of groups
  };

  // What the workers of a loop were told, as far as fairness goes.
  struct Fairness {
    std::map<uint32_t, uint64_t> seeds;  // of those that run, by slot
    uint64_t oldest = 0;
    int num_steps_without_oldest = 0;
  };

  void ChooseOptions();
  std::unique_ptr<GroupLoop> MakeLoop(const StepLoop::Options& options, StatusBoard& board,
                                      Metrics& metrics, Engine::OnLost on_lost);
  void PlanTheStory();
  void Close();

  void Arrive();
  void TakeRefusal(const MadeUpRequest& made, const absl::Status& refusal, bool was_serving);
  void HangUp(Live& live);
  void HangUpAll();

  void OnQueued(int loop, SequenceId id, const LiveRequest& queued);
  void OnStepSent(int loop, const v1::StepCommand& command);
  void CheckNobodyIsOvertaken(int loop, const Live& admitted);
  void CheckTheOldestIsServed(const v1::StepCommand& command, Fairness& fairness);
  void OnLost(int loop, const std::vector<Inbox::Submission>& unfinished);
  void OnHeartbeat(int loop);

  bool RunUntil(const std::function<bool()>& condition);
  bool AllAreDone() const;
  bool AllIsFree() const;
  void CheckNothingIsLeft();
  bool IsFull(int num_prompt_tokens) const;
  // Whether it comes first where both wait or run.
  bool IsBefore(const Live& a, const Live& b) const;
  bool is_serving() const {
    return absl::c_any_of(loops_, [](const SimulatedLoop* loop) { return loop->is_serving(); });
  }

  World world_;
  bool lost_ones_go_on_ = false;
  bool has_faults_ = false;
  int num_loops_ = 1;
  StepLoop::Options loop_options_;
  SimulatedCluster::Options cluster_options_;

  uint64_t last_seed_ = 0;   // of a request
  bool is_closing_ = false;  // drains, or stops
  bool story_is_over_ = false;
  int64_t num_events_ = 0;
  std::map<uint64_t, Live> live_;      // by the request's seed
  std::vector<Fairness> fairness_;     // by loop
  std::vector<SimulatedLoop*> loops_;  // the router's
  std::unique_ptr<GroupRouter> router_;
  std::unique_ptr<Admission> admission_;
};

Simulation::Simulation(uint64_t seed, Metrics& metrics) : world_(seed) {
  ChooseOptions();
  fairness_.resize(num_loops_);
  GroupRouter::Options options{
      .version = "simulated",
      .groups = std::vector<StepLoop::Options>(num_loops_, loop_options_),
      .make_loop =
          [this](const StepLoop::Options& options, StatusBoard& board, Metrics& metrics,
                 Engine::OnLost on_lost) {
            return MakeLoop(options, board, metrics, std::move(on_lost));
          },
      // It has no clock here: lost requests wait as long as it takes, or end.
      .recovery_timeout = lost_ones_go_on_ ? absl::InfiniteDuration() : absl::ZeroDuration()};
  router_ = std::make_unique<GroupRouter>(std::move(options), metrics, [](bool) {});
  admission_ = std::make_unique<Admission>(/*seed=*/1, *router_, metrics);
}

void Simulation::ChooseOptions() {
  Random& random = world_.random;
  lost_ones_go_on_ = !random.OneIn(3);
  num_loops_ = random.Between(1, 2);
  loop_options_.engine = {
      .max_prompt_logprob_rows_per_step = random.OneIn(3) ? random.Between(1, 4) : 256,
      .target_itl = random.OneIn(3) ? random.Between(absl::Milliseconds(1), absl::Milliseconds(20))
                                    : absl::ZeroDuration(),
      .enable_prefix_caching = !random.OneIn(4),
      .max_steps_in_flight = random.OneIn(4) ? 1 : random.Between(2, 3),
      .min_backoff = absl::Milliseconds(10),
      .max_backoff = absl::Milliseconds(200),
      // Never: then a forgotten wake-up is not made good by the line that is due.
      .log_interval = absl::InfiniteDuration()};
  if (random.OneIn(3)) loop_options_.engine.policy = SchedulingPolicy::kPriority;
  loop_options_.max_queued_requests = random.OneIn(3) ? random.Between(1, 4) : 64;
  loop_options_.max_queued_tokens = random.OneIn(4) ? random.Between(20, 400) : 0;

  SimulatedCluster::Options& cluster = cluster_options_;
  cluster.num_workers = random.Between(1, 4);
  const int max_sequences = random.Between(1, 12);
  constexpr int kBlockSizes[] = {1, 4, 16};
  cluster.plan = {
      .version = "simulated",
      .block_size = kBlockSizes[random.Between(0, 2)],
      .max_tokens_per_step = random.OneIn(3) ? random.Between(1, 8) : random.Between(16, 128),
      .max_sequences = max_sequences};
  cluster.max_logit_rows = max_sequences + loop_options_.engine.max_prompt_logprob_rows_per_step;
  v1::DescribeResponse& description = cluster.description;
  description.set_version("simulated");
  description.set_vocab_size(random.OneIn(2) ? random.Between(8, 30) : 1000);
  description.set_max_position_embeddings(random.Between(16, 200));
  for (uint32_t token_id = 3; token_id < 6; ++token_id) description.add_eos_token_ids(token_id);
  // From room for little more than one request to room for all.
  const int most_blocks = max_sequences * 200 / cluster.plan.block_size;
  description.mutable_plan()->set_kv_block_capacity(
      random.Between(2, random.OneIn(2) ? std::min(most_blocks, 60) : most_blocks) + 1);
  cluster.max_step_time = random.Between(absl::Microseconds(200), absl::Milliseconds(30));
  cluster.max_delay = random.Between(absl::Microseconds(20), absl::Milliseconds(10));
  has_faults_ = !random.OneIn(4);
  if (!has_faults_) return;

  const auto rate = [&random](int n) { return random.OneIn(2) ? 0.0 : 1.0 / n; };
  cluster.faults = {.death = rate(150),
                    .silence = rate(400),
                    .slowness = rate(200),
                    .stream_error = rate(400),
                    .duplicate = rate(400),
                    .stale = rate(400),
                    .spoiled = rate(400),
                    .sequence_fault = rate(100),
                    .join_failure = rate(4),
                    .other_capacity = rate(4)};
}

std::unique_ptr<GroupLoop> Simulation::MakeLoop(const StepLoop::Options& options,
                                                StatusBoard& board, Metrics& metrics,
                                                Engine::OnLost on_lost) {
  const int index = static_cast<int>(loops_.size());
  SimulatedCluster::Listener cluster{
      .on_step_sent = [this, index](const v1::StepCommand& command) { OnStepSent(index, command); },
      .salt_of = [this](uint64_t seed) { return live_.at(seed).client->salt(); },
      .on_sequence_fault = [this](uint64_t seed) { live_.at(seed).client->AllowFault(); },
      .is_poison = [this](uint64_t seed) { return live_.at(seed).is_poison; }};
  SimulatedLoop::Listener listener{
      .cluster = std::move(cluster),
      .on_queued = [this, index](SequenceId id,
                                 const LiveRequest& queued) { OnQueued(index, id, queued); },
      .on_lost =
          [this, index](const std::vector<Inbox::Submission>& unfinished) {
            OnLost(index, unfinished);
          },
      .on_heartbeat = [this, index] { OnHeartbeat(index); }};
  auto loop = std::make_unique<SimulatedLoop>(options, cluster_options_, world_, board, metrics,
                                              std::move(on_lost), std::move(listener));
  loops_.push_back(loop.get());
  return loop;
}

// Who comes when, and what happens to everybody at once.
void Simulation::PlanTheStory() {
  Random& random = world_.random;
  const absl::Duration length = random.Between(absl::Milliseconds(50), absl::Seconds(2));
  const auto at_some_time = [&](absl::Duration end, std::function<void()> action) {
    world_.clock.After(random.Between(absl::ZeroDuration(), end), std::move(action));
  };
  for (int i = random.Between(1, 16); i > 0; --i) {
    at_some_time(length, [this] {
      for (int k = world_.random.Between(1, 6); k > 0; --k) Arrive();
    });
  }
  if (random.OneIn(3)) at_some_time(length, [this] { HangUpAll(); });
  if (has_faults_ && random.OneIn(3)) {
    at_some_time(length, [this] {
      for (SimulatedLoop* const loop : loops_) loop->cluster().KillSomeone();
    });
  }
  if (random.OneIn(20)) {
    at_some_time(2 * length, [this] {
      Close();
      for (auto& [seed, live] : live_) live.client->AllowUnavailable();
      router_->Stop();
    });
  }
  if (random.OneIn(20)) {
    at_some_time(2 * length, [this] {
      Close();
      router_->Drain();
    });
  }
  world_.clock.After(length, [this] {
    world_.Log("faults stop");
    story_is_over_ = true;
    for (const auto& loop : loops_) loop->cluster().StopFaults();
  });
}

// From now on nobody waits for workers.
void Simulation::Close() {
  is_closing_ = true;
  for (auto& [seed, live] : live_) {
    if (live.loop == kNowhere) live.client->AllowUnavailable();
  }
}

void Simulation::Arrive() {
  ++world_.tally.requests;
  const std::optional<ModelLimits> limits = router_->model_limits();
  if (!limits.has_value()) return world_.Fail("the limits of the model are forgotten");
  const MadeUpRequest made = MakeUpRequest(world_.random, *limits, ++last_seed_);
  const bool was_serving = is_serving();
  auto client = std::make_shared<SimulatedClient>(world_, made.message, *limits);
  if (made.message.sampling()
          .has_grammar()) {  // while that is prepared the queue may fill, and workers come and go
    client->AllowQueueFull();
    client->AllowUnavailable();
  }
  // Before it is submitted: from then on it is heard of.
  Live& live = live_.emplace(client->seed(), Live{.client = client}).first->second;
  world_.Log("comes", client->seed());
  const absl::StatusOr<RequestId> id = admission_->Submit(made.message, client);
  if (!id.ok()) {
    live_.erase(client->seed());
    return TakeRefusal(made, id.status(), was_serving);
  }
  if (!made.is_valid) {
    world_.Fail(absl::StrCat("taken though it is invalid: ", made.message.ShortDebugString()));
  }
  live.request_id = *id;
  live.is_poison = has_faults_ && !story_is_over_ && world_.random.OneIn(100);
  if (!world_.random.OneIn(5)) return;
  world_.clock.After(world_.random.Between(absl::ZeroDuration(), absl::Milliseconds(300)),
                     [this, seed = client->seed()] { HangUp(live_.at(seed)); });
}

void Simulation::TakeRefusal(const MadeUpRequest& made, const absl::Status& refusal,
                             bool was_serving) {
  world_.Log("refused", last_seed_, static_cast<uint64_t>(refusal.code()));
  if (absl::IsInvalidArgument(refusal)) {
    ++world_.tally.refused_invalid;
    if (made.is_valid) world_.Fail(absl::StrCat("refused: ", refusal.message()));
  } else if (absl::IsResourceExhausted(refusal)) {
    ++world_.tally.refused_full;
    // Who waits for a grammar is in no queue.
    if (!made.message.sampling().has_grammar() && !IsFull(made.message.prompt_token_ids_size()))
      world_.Fail("refused though the queue is not full");
  } else {
    ++world_.tally.refused_unavailable;
    if (was_serving && !is_closing_) world_.Fail(absl::StrCat("refused: ", refusal.message()));
  }
}

// Whether no queue has room for it: as much as may wait is there, though some of that may run.
bool Simulation::IsFull(int num_prompt_tokens) const {
  std::map<int, std::pair<int, int64_t>> loads;  // requests and tokens, by loop
  for (const auto& [seed, live] : live_) {
    const SimulatedClient& client = *live.client;
    if (client.has_ended() || client.is_silenced()) continue;
    auto& [num_requests, num_tokens] = loads[live.loop];
    ++num_requests;
    num_tokens += client.most_tokens();
  }
  const auto is_full = [&](int loop) {
    const auto& [num_requests, num_tokens] = loads[loop];
    const int64_t max_tokens = loop_options_.max_queued_tokens;
    return num_requests >= loop_options_.max_queued_requests ||
           (max_tokens > 0 && num_tokens + num_prompt_tokens > max_tokens);
  };
  if (!is_serving()) return is_full(kNowhere);
  for (int i = 0; i < num_loops_; ++i) {
    if (loops_[i]->is_serving() && !is_full(i)) return false;
  }
  return true;
}

bool Simulation::IsBefore(const Live& a, const Live& b) const {
  const int priority_of_a = a.client->request().priority();
  const int priority_of_b = b.client->request().priority();
  if (loop_options_.engine.policy == SchedulingPolicy::kPriority &&
      priority_of_a != priority_of_b) {
    return priority_of_a < priority_of_b;
  }
  return a.id < b.id;
}

void Simulation::HangUp(Live& live) {
  if (live.client->is_done()) return;
  ++world_.tally.cancelled;
  world_.Log("hangs up", live.client->seed());
  live.client->HangUp();
  admission_->Cancel(live.request_id);
  if (live.loop == kNowhere) live.client->ExpectSilence();
}

void Simulation::HangUpAll() {
  for (auto& [seed, live] : live_) {
    if (!world_.random.OneIn(6)) HangUp(live);
  }
}

// Of a queued one the request tells which it is.
void Simulation::OnQueued(int loop, SequenceId id, const LiveRequest& queued) {
  const auto found = live_.find(queued.request->sampling.seed());
  if (found == live_.end()) return world_.Fail("somebody unknown is queued");
  Live& live = found->second;
  if (live.loop != kNowhere) world_.Fail("a request is in two places");
  if (live.client->has_hung_up()) world_.Fail("somebody who has hung up is queued");
  world_.Log("queued", live.client->seed(), loop, id);
  live.request = queued.request;
  live.loop = loop;
  live.id = id;
  live.queued_at = world_.clock.now();
  live.is_admitted = false;
  live.num_overtakers = 0;
}

void Simulation::OnStepSent(int loop, const v1::StepCommand& command) {
  Fairness& fairness = fairness_[loop];
  if (command.step() == 1) fairness = {};
  for (const uint32_t slot : command.released_slots()) fairness.seeds.erase(slot);
  for (const v1::SequenceAdmission& admission : command.admitted()) {
    const uint64_t seed = admission.sampling().seed();
    fairness.seeds[admission.slot()] = seed;
    const auto admitted = live_.find(seed);
    if (admitted == live_.end()) return world_.Fail("somebody unknown is admitted");
    if (std::exchange(admitted->second.is_admitted, true)) {
      ++world_.tally.preemptions;  // and is back
    } else {
      CheckNobodyIsOvertaken(loop, admitted->second);
    }
  }
  CheckTheOldestIsServed(command, fairness);
}

void Simulation::CheckNobodyIsOvertaken(int loop, const Live& admitted) {
  for (auto& [seed, live] : live_) {
    const bool waits = live.loop == loop && !live.is_admitted && !live.client->is_done();
    if (!waits || !IsBefore(live, admitted)) continue;
    const int64_t most_milliseconds = live.client->request().max_queue_ms();
    const absl::Duration waited = world_.clock.now() - live.queued_at;
    if (most_milliseconds > 0 && waited >= absl::Milliseconds(most_milliseconds)) continue;
    if (++live.num_overtakers > kMaxOvertakers) {
      world_.Fail(absl::StrCat("request ", seed, " was overtaken by ", admitted.client->seed()));
    }
  }
}

// Of those that run it is part of every step, unless steps in flight end it, or younger ones decode
// in blocks that it needs: each of these wants another one, and gives way, within block_size steps.
void Simulation::CheckTheOldestIsServed(const v1::StepCommand& command, Fairness& fairness) {
  uint32_t slot_of_oldest = 0;
  const Live* oldest = nullptr;
  for (const auto& [slot, seed] : fairness.seeds) {
    const Live& live = live_.at(seed);
    if (live.client->is_done() || (oldest != nullptr && IsBefore(*oldest, live))) continue;
    oldest = &live;
    slot_of_oldest = slot;
  }
  if (oldest == nullptr) return;
  const GroupPlanOptions& plan = cluster_options_.plan;
  const bool is_served = absl::c_linear_search(command.slots(), slot_of_oldest);
  if (is_served || fairness.oldest != oldest->id) fairness.num_steps_without_oldest = 0;
  fairness.oldest = oldest->id;
  if (is_served || plan.max_tokens_per_step <= plan.max_sequences)
    return;  // decoding may take it all
  const int most_steps =
      loop_options_.engine.max_steps_in_flight + plan.block_size * plan.max_sequences;
  if (++fairness.num_steps_without_oldest >= most_steps) {
    world_.Fail(absl::StrCat("request ", oldest->client->seed(), " runs longest and starves"));
  }
}

void Simulation::OnLost(int loop, const std::vector<Inbox::Submission>& unfinished) {
  ++world_.tally.groups_broken;
  world_.Log("group lost", loop, unfinished.size());
  for (auto& [seed, live] : live_) {
    if (live.loop != loop || live.client->has_ended()) continue;
    live.loop = kNowhere;
    if (live.client->has_hung_up()) {
      live.client->ExpectSilence();
      continue;
    }
    const bool is_futile = ++live.num_losses >= GroupRouter::kMaxFutileLosses;
    if (is_futile || is_closing_ || !(lost_ones_go_on_ || is_serving())) {
      live.client->AllowUnavailable();
    }
  }
}

void Simulation::OnHeartbeat(int loop) {
  const bool has_emptied_inbox = loops_[loop]->is_serving();
  for (const auto& [seed, live] : live_) {
    if (live.client->has_unflushed())
      world_.Fail(absl::StrCat("request ", seed, " is not flushed"));
    if (live.loop == loop && live.client->has_hung_up() && has_emptied_inbox) {
      live.client->ExpectSilence();
    }
  }
  // Preempted ones wait again, lost ones besides.
  const auto most_waiting = static_cast<uint32_t>(loop_options_.max_queued_requests +
                                                  cluster_options_.plan.max_sequences);
  const uint32_t num_waiting = loops_[loop]->board().server_info().num_waiting();
  if (world_.tally.resumed == 0 && num_waiting > most_waiting) {
    world_.Fail(absl::StrCat(num_waiting, " requests wait"));
  }
}

bool Simulation::AllAreDone() const {
  return std::all_of(live_.begin(), live_.end(),
                     [](const auto& entry) { return entry.second.client->is_done(); });
}

// Lets things happen until the condition holds; false when the run has failed before.
bool Simulation::RunUntil(const std::function<bool()>& condition) {
  while (!world_.failure.has_value()) {
    if (condition()) return true;
    if (!world_.clock.RunNext()) {
      world_.Fail("nothing is going to happen any more");
    } else if (++num_events_ > kMostEvents || world_.clock.now() > kLongestRun) {
      world_.Fail("the run does not come to its end");
    }
  }
  return false;
}

SimulationResult Simulation::Run() {
  for (const auto& loop : loops_) loop->Start();
  RunUntil(
      [this] { return absl::c_all_of(loops_, [](const auto& l) { return l->is_serving(); }); });
  PlanTheStory();
  if (RunUntil([this] { return story_is_over_ && AllAreDone(); }) &&
      RunUntil([this] { return AllIsFree(); })) {
    CheckNothingIsLeft();
    router_->Drain();
    RunUntil([this] {
      return std::all_of(loops_.begin(), loops_.end(),
                         [](const auto& loop) { return loop->has_ended(); });
    });
  }
  return {.failure = world_.failure,
          .last_events = world_.log.Tail(),
          .log_hash = world_.log.hash(),
          .tally = world_.tally};
}

bool Simulation::AllIsFree() const {
  return std::all_of(loops_.begin(), loops_.end(), [](const auto& loop) {
    const v1::ServerInfo info = loop->board().server_info();
    return loop->has_ended() ||
           (info.num_running() + info.num_waiting() == 0 && info.num_kv_blocks() > 0 &&
            info.num_free_kv_blocks() == info.num_kv_blocks());
  });
}

void Simulation::CheckNothingIsLeft() {
  for (const auto& [seed, live] : live_) {
    if (!live.request.expired() || live.client.use_count() != 1) {
      return world_.Fail(absl::StrCat("something holds on to request ", seed));
    }
  }
}

uint64_t running_seed = 0;
const Simulation* running = nullptr;

void OnAbort(int) {
  if (running == nullptr) return;
  std::printf("seed %llu: a CHECK failed\n%s", static_cast<unsigned long long>(running_seed),
              running->last_events().c_str());
  std::fflush(stdout);
}

}  // namespace

SimulationResult Simulate(uint64_t seed, Metrics& metrics) {
  Simulation simulation(seed, metrics);
  running_seed = seed;
  running = &simulation;
  SimulationResult result = simulation.Run();
  running = nullptr;
  return result;
}

void TellSeedOnAbort() { std::signal(SIGABRT, OnAbort); }

}  // namespace fathom
