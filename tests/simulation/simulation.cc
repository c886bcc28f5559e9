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
#include "coordinator/request_validation.h"
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
  // A request on its way, and where it is.
  struct Live {
    std::shared_ptr<SimulatedClient> client;
    std::weak_ptr<const Request> request;
    size_t loop = 0;
    SequenceId id = 0;  // there
    bool is_homeless = false;
    bool is_admitted = false;  // by the group that it is in now
    int num_overtakers = 0;
  };

  // What the workers of a loop were told, as far as fairness goes.
  struct Fairness {
    std::map<uint32_t, uint64_t> seeds;  // of those that run, by slot
    uint64_t oldest = 0;
    int num_steps_without_oldest = 0;
  };

  SimulatedLoop::Options RandomLoopOptions();
  void MakeLoop(size_t index, const SimulatedLoop::Options& options);
  void PlanTheStory();

  void Arrive();
  void Submit(const MadeUpRequest& made, const ModelLimits& limits);
  void HangUp(Live& live);
  void HangUpAll();

  void OnStepSent(size_t loop, const v1::StepCommand& command);
  void CheckNobodyIsOvertaken(size_t loop, const Live& admitted);
  void CheckTheOldestIsServed(const v1::StepCommand& command, Fairness& fairness);
  void OnLost(size_t loop, std::vector<Inbox::Submission> unfinished, const absl::Status& cause);
  void OnHeartbeat(size_t loop);
  void FindHomes();

  bool RunUntil(const std::function<bool()>& condition);
  bool AllAreDone() const;
  bool AllIsFree() const;
  void CheckNothingIsLeft();
  int MostWaiting(size_t loop) const;

  World world_;
  Metrics& metrics_;
  uint64_t last_seed_ = 0;  // of a request
  bool lost_ones_go_on_ = false;
  bool is_closing_ = false;  // drains, or stops
  bool story_is_over_ = false;
  int64_t num_events_ = 0;
  int max_sequences_ = 0;
  int max_tokens_per_step_ = 0;
  int max_steps_in_flight_ = 0;
  int max_queued_requests_ = 0;
  std::map<uint64_t, Live> live_;      // by the request's seed
  std::vector<LiveRequest> homeless_;  // lost, waiting for workers
  std::vector<Fairness> fairness_;     // by loop
  std::vector<std::unique_ptr<SimulatedLoop>> loops_;
};

Simulation::Simulation(uint64_t seed, Metrics& metrics) : world_(seed), metrics_(metrics) {
  lost_ones_go_on_ = world_.random.OneIn(2);
  const SimulatedLoop::Options options = RandomLoopOptions();
  const int num_loops = lost_ones_go_on_ ? world_.random.Between(1, 2) : 1;
  fairness_.resize(num_loops);
  for (int i = 0; i < num_loops; ++i) MakeLoop(i, options);
}

SimulatedLoop::Options Simulation::RandomLoopOptions() {
  Random& random = world_.random;
  SimulatedLoop::Options options;
  options.engine = {
      .max_prompt_logprob_rows_per_step = random.OneIn(3) ? random.Between(1, 4) : 256,
      .target_itl = random.OneIn(3) ? random.Between(absl::Milliseconds(1), absl::Milliseconds(20))
                                    : absl::ZeroDuration(),
      .enable_prefix_caching = !random.OneIn(4),
      .max_steps_in_flight = random.OneIn(4) ? 1 : random.Between(2, 3),
      .min_backoff = absl::Milliseconds(10),
      .max_backoff = absl::Milliseconds(200),
      // Never: then a forgotten wake-up is not made good by the line that is due.
      .log_interval = absl::InfiniteDuration()};
  max_queued_requests_ = random.OneIn(3) ? random.Between(1, 4) : 64;
  options.max_queued_requests = max_queued_requests_;

  SimulatedCluster::Options& cluster = options.cluster;
  max_steps_in_flight_ = options.engine.max_steps_in_flight;
  cluster.num_workers = random.Between(1, 4);
  max_sequences_ = random.Between(1, 12);
  max_tokens_per_step_ = random.OneIn(3) ? random.Between(1, 8) : random.Between(16, 128);
  constexpr int kBlockSizes[] = {1, 4, 16};
  cluster.plan = {
      .version = "simulated",
      .block_size = kBlockSizes[random.Between(0, 2)],
      .max_tokens_per_step = random.OneIn(3) ? random.Between(1, 8) : random.Between(16, 128),
      .max_sequences = max_sequences_};
  cluster.max_logit_rows = max_sequences_ + options.engine.max_prompt_logprob_rows_per_step;
  v1::DescribeResponse& description = cluster.description;
  description.set_version("simulated");
  description.set_vocab_size(random.OneIn(2) ? random.Between(8, 30) : 1000);
  description.set_max_position_embeddings(random.Between(16, 200));
  for (uint32_t token_id = 3; token_id < 6; ++token_id) description.add_eos_token_ids(token_id);
  // From room for little more than one request to room for all.
  const int most_blocks = max_sequences_ * 200 / cluster.plan.block_size;
  description.mutable_plan()->set_kv_block_capacity(
      random.Between(2, random.OneIn(2) ? std::min(most_blocks, 60) : most_blocks) + 1);
  cluster.max_step_time = random.Between(absl::Microseconds(200), absl::Milliseconds(30));
  cluster.max_delay = random.Between(absl::Microseconds(20), absl::Milliseconds(10));
  if (random.OneIn(4)) return options;  // nothing breaks

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
  return options;
}

void Simulation::MakeLoop(size_t index, const SimulatedLoop::Options& options) {
  SimulatedCluster::Listener listener{
      .on_step_sent = [this, index](const v1::StepCommand& command) { OnStepSent(index, command); },
      .salt_of = [this](uint64_t seed) { return live_.at(seed).client->salt(); },
      .on_sequence_fault =
          [this](uint64_t seed) {
            const auto live = live_.find(seed);
            if (live != live_.end()) live->second.client->AllowFault();
          }};
  loops_.push_back(std::make_unique<SimulatedLoop>(
      options, world_, metrics_, std::move(listener),
      [this, index](std::vector<Inbox::Submission> unfinished, const absl::Status& cause) {
        OnLost(index, std::move(unfinished), cause);
      },
      [this, index] { OnHeartbeat(index); }));
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
  if (random.OneIn(20)) {
    at_some_time(2 * length, [this] {
      is_closing_ = true;
      for (auto& [seed, live] : live_) live.client->AllowUnavailable();
      for (const auto& loop : loops_) loop->Stop();
      FindHomes();
    });
  }
  if (random.OneIn(20)) {
    at_some_time(2 * length, [this] {
      is_closing_ = true;
      for (const auto& loop : loops_) loop->Drain();
      FindHomes();
    });
  }
  world_.clock.After(length, [this] {
    world_.Log("faults stop");
    story_is_over_ = true;
    for (const auto& loop : loops_) loop->cluster().StopFaults();
  });
}

// A client comes, to whichever loop it is sent, as a router would.
void Simulation::Arrive() {
  ++world_.tally.requests;
  const size_t loop = world_.random.Between(0, static_cast<int>(loops_.size()) - 1);
  const std::optional<ModelLimits> limits = loops_[loop]->board().model_limits();
  if (!limits.has_value()) {
    ++world_.tally.refused_unavailable;
    return;
  }
  const MadeUpRequest made = MakeUpRequest(world_.random, *limits, ++last_seed_);
  absl::StatusOr<std::shared_ptr<const Request>> request =
      ValidateRequest(made.message, *limits, /*default_seed=*/0);
  if (request.ok() != made.is_valid) {
    world_.Fail(absl::StrCat("validation says ", request.status().ToString(), " of ",
                             made.message.ShortDebugString()));
  }
  if (!request.ok()) {
    ++world_.tally.refused_invalid;
    return;
  }
  const int most_waiting = MostWaiting(loop);
  const bool was_serving = loops_[loop]->is_serving();
  auto client = std::make_shared<SimulatedClient>(world_, made.message, *limits);
  Live live{.client = client, .request = *request, .loop = loop};
  const absl::StatusOr<SequenceId> id =
      loops_[loop]->inbox().Submit({.request = *std::move(request), .stream = client});
  if (id.ok()) {
    world_.Log("comes", client->seed(), loop, *id);
    live.id = *id;
    if (world_.random.OneIn(5)) {
      world_.clock.After(world_.random.Between(absl::ZeroDuration(), absl::Milliseconds(300)),
                         [this, seed = client->seed()] {
                           const auto found = live_.find(seed);
                           if (found != live_.end()) HangUp(found->second);
                         });
    }
    live_.emplace(client->seed(), std::move(live));
  } else if (absl::IsResourceExhausted(id.status())) {
    ++world_.tally.refused_full;
    if (most_waiting < max_queued_requests_) world_.Fail("refused though the queue is not full");
  } else {
    ++world_.tally.refused_unavailable;
    if (was_serving) world_.Fail(absl::StrCat("refused: ", id.status().message()));
  }
}

// An upper bound: some of these run.
int Simulation::MostWaiting(size_t loop) const {
  int count = 0;
  for (const auto& [seed, live] : live_) {
    const SimulatedClient& client = *live.client;
    if (live.loop == loop && !live.is_homeless && !client.has_ended() && !client.is_silenced()) {
      ++count;
    }
  }
  return count;
}

void Simulation::HangUp(Live& live) {
  if (live.client->is_done()) return;
  ++world_.tally.cancelled;
  world_.Log("hangs up", live.client->seed());
  live.client->HangUp();
  if (live.is_homeless) {
    std::erase_if(homeless_, [&](const LiveRequest& lost) { return lost.stream == live.client; });
    live.is_homeless = false;
    live.client->ExpectSilence();
  } else {
    loops_[live.loop]->inbox().Cancel(live.id);
  }
}

void Simulation::HangUpAll() {
  for (auto& [seed, live] : live_) {
    if (!world_.random.OneIn(6)) HangUp(live);
  }
}

void Simulation::OnStepSent(size_t loop, const v1::StepCommand& command) {
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

void Simulation::CheckNobodyIsOvertaken(size_t loop, const Live& admitted) {
  for (auto& [seed, live] : live_) {
    const bool waits =
        live.loop == loop && !live.is_homeless && !live.is_admitted && !live.client->is_done();
    if (!waits || live.id > admitted.id) continue;
    if (++live.num_overtakers > kMaxOvertakers) {
      world_.Fail(absl::StrCat("request ", seed, " was overtaken by ", admitted.client->seed()));
    }
  }
}

// Of those that run it is part of every step, unless steps in flight end it.
void Simulation::CheckTheOldestIsServed(const v1::StepCommand& command, Fairness& fairness) {
  uint32_t slot_of_oldest = 0;
  const Live* oldest = nullptr;
  for (const auto& [slot, seed] : fairness.seeds) {
    const Live& live = live_.at(seed);
    if (live.client->is_done() || (oldest != nullptr && oldest->id < live.id)) continue;
    oldest = &live;
    slot_of_oldest = slot;
  }
  if (oldest == nullptr) return;
  const bool is_served = absl::c_linear_search(command.slots(), slot_of_oldest);
  if (is_served || fairness.oldest != oldest->id) fairness.num_steps_without_oldest = 0;
  fairness.oldest = oldest->id;
  if (is_served || max_tokens_per_step_ <= max_sequences_) return;  // decoding may take it all
  if (++fairness.num_steps_without_oldest >= max_steps_in_flight_) {
    world_.Fail(absl::StrCat("request ", oldest->client->seed(), " runs longest and starves"));
  }
}

void Simulation::OnLost(size_t loop, std::vector<Inbox::Submission> unfinished,
                        const absl::Status& cause) {
  ++world_.tally.groups_broken;
  world_.Log("group lost", loop, unfinished.size());
  for (auto& [seed, live] : live_) {
    if (live.loop != loop || live.is_homeless) continue;
    live.is_admitted = false;
    if (!lost_ones_go_on_) live.client->AllowUnavailable();
    if (live.client->has_hung_up()) live.client->ExpectSilence();
  }
  if (!lost_ones_go_on_) return Engine::EndLost(std::move(unfinished), cause);
  for (Inbox::Submission& submission : unfinished) {
    Live& live = live_.at(submission.live.request->sampling.seed());
    if (live.client->has_hung_up()) world_.Fail("somebody who has hung up is handed over");
    live.is_homeless = true;
    homeless_.push_back(std::move(submission.live));
  }
  FindHomes();
}

void Simulation::OnHeartbeat(size_t loop) {
  for (const auto& [seed, live] : live_) {
    if (live.client->has_unflushed())
      world_.Fail(absl::StrCat("request ", seed, " is not flushed"));
  }
  if (loops_[loop]->is_serving()) {  // then it has looked into its inbox
    for (auto& [seed, live] : live_) {
      if (live.loop == loop && live.client->has_hung_up()) live.client->ExpectSilence();
    }
  }
  // Preempted ones wait again, lost ones besides.
  const uint32_t num_waiting = loops_[loop]->board().server_info().num_waiting();
  if (!lost_ones_go_on_ &&
      num_waiting > static_cast<uint32_t>(max_queued_requests_ + max_sequences_)) {
    world_.Fail(absl::StrCat(num_waiting, " requests wait"));
  }
  FindHomes();
}

// Gives lost requests to loops that serve.
void Simulation::FindHomes() {
  if (homeless_.empty()) return;
  if (is_closing_) {
    for (const LiveRequest& lost : std::exchange(homeless_, {})) {
      Live& live = live_.at(lost.request->sampling.seed());
      live.client->AllowUnavailable();
      live.is_homeless = false;
      lost.stream->OnEnd(absl::UnavailableError("there are no workers any more"));
      lost.stream->Flush();
    }
  }
  std::vector<size_t> serving;
  for (size_t i = 0; i < loops_.size(); ++i) {
    if (loops_[i]->is_serving()) serving.push_back(i);
  }
  if (serving.empty()) return;
  for (LiveRequest& lost : std::exchange(homeless_, {})) {
    Live& live = live_.at(lost.request->sampling.seed());
    live.loop = serving[world_.random.Between(0, static_cast<int>(serving.size()) - 1)];
    const absl::StatusOr<SequenceId> id = loops_[live.loop]->inbox().Resume(std::move(lost));
    if (!id.ok()) return world_.Fail(absl::StrCat("not resumed: ", id.status().message()));
    ++world_.tally.resumed;
    live.id = *id;
    live.is_homeless = false;
    live.num_overtakers = 0;
    world_.Log("goes on", live.client->seed(), live.loop, *id);
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
    for (const auto& loop : loops_) loop->Drain();
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
