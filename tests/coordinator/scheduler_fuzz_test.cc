// Random requests, cancels, faults and stops against a model of the worker's books and memory.
//
// After every step: every position of a sequence that counts as computed holds the KV of that very
// prefix, blocks are conserved and belong to one sequence unless they are shared, no slot has two
// owners, the budgets are kept, chunks follow each other without gap or overlap, the running are
// older than the waiting. At the end: every request has ended the way it should, and all is free
// again. Many requests begin alike; in some runs hashes are a few bits, so that they clash. And
// with several steps in flight every request gets what it gets with one.
#include <algorithm>
#include <cstdint>
#include <deque>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "coordinator/scheduler.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

constexpr uint32_t kEos = 0;
constexpr uint32_t kVocabSize = 20;

// What a request must generate: a hash of its number and the position.
uint32_t TokenAt(SequenceId id, size_t position) {
  uint64_t x = id * 0x9e3779b97f4a7c15u + position * 0xbf58476d1ce4e5b9u;
  x ^= x >> 29;
  return static_cast<uint32_t>(x % kVocabSize);
}

// What the KV of a position depends on: its token and all before it.
uint64_t KvAfter(uint64_t before, uint32_t token) {
  uint64_t x = (before ^ token) * 0xbf58476d1ce4e5b9u + 0x9e3779b97f4a7c15u;
  return x ^ (x >> 31);
}

// The worker's view of one slot.
struct Mirror {
  SequenceId id;
  int kv_domain;
  std::vector<uint32_t> tokens;
  int num_computed;
  bool has_fault;
  std::vector<int32_t> blocks;
};

// What a client got in all.
struct Outcome {
  size_t num_tokens;
  int num_prompt_logprobs;
  std::optional<EndReason> end;
  bool operator==(const Outcome&) const = default;
};

void PrintTo(const Outcome& outcome, std::ostream* os) {
  *os << outcome.num_tokens << " tokens, " << outcome.num_prompt_logprobs
      << " prompt logprobs, end " << (outcome.end ? static_cast<int>(*outcome.end) : -1);
}

class SchedulerFuzz {
 public:
  // `max_steps_in_flight` changes when things happen, but none of what is asked for.
  SchedulerFuzz(uint64_t seed, int max_steps_in_flight)
      : seed_(seed),
        random_(seed),
        options_(RandomOptions()),
        request_random_(random_()),
        max_steps_in_flight_(max_steps_in_flight),
        scheduler_(options_),
        kv_(size_t{1} * options_.num_kv_domains * options_.num_kv_blocks * options_.block_size) {}

  const Scheduler::PrefixFigures& prefix_figures() const { return scheduler_.prefix_figures(); }
  int64_t num_preemptions() const { return scheduler_.num_preemptions(); }

  // By id, of those that were not cancelled.
  const std::map<SequenceId, Outcome>& outcomes() const { return outcomes_; }
  int num_wasted_rows() const { return num_wasted_rows_; }

  void RunWithCancelsAndFaults() {
    has_random_faults_ = true;
    const int num_operations = Between(200, 600);
    for (int i = 0; i < num_operations && !::testing::Test::HasFailure(); ++i) {
      const int dice = Between(0, 9);
      if (dice < 3)
        AddRequest();
      else if (dice == 3)
        CancelSomething();
      else
        MakeStep();
    }
    Finish();
  }

  void Run(int num_requests) {
    while (num_requests > 0 && !::testing::Test::HasFailure()) {
      if (Between(0, 2) == 0) {
        AddRequest();
        --num_requests;
      } else {
        MakeStep();
      }
    }
    Finish();
  }

 private:
  void Finish() {
    // Every request ends in a bounded number of steps.
    int64_t num_steps = 0;
    while (!live_.empty() && !::testing::Test::HasFailure()) {
      MakeStep();
      ASSERT_LT(++num_steps, 200000) << live_.size() << " requests did not end";
    }
    while (!in_flight_.empty()) CommitOldest();
    EXPECT_EQ(scheduler_.num_running(), 0);
    EXPECT_EQ(scheduler_.num_waiting(), 0);
    EXPECT_EQ(scheduler_.num_free_blocks(), scheduler_.num_blocks());
  }

  struct Live {
    std::shared_ptr<const Request> request;
    size_t num_received = 0;
    int num_prompt_logprobs = 0;
    int num_prompt_tokens = 0;
    bool started = false;
  };
  struct InFlight {
    Step step;
    StepOutcome outcome;
  };

  static int Draw(std::mt19937_64& random, int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  }
  int Between(int low, int high) { return Draw(random_, low, high); }

  Scheduler::Options RandomOptions() {
    Scheduler::Options options;
    options.max_tokens_per_step = Between(0, 3) == 0 ? Between(1, 4) : Between(5, 100);
    options.max_sequences = Between(1, 12);
    options.max_prompt_logprob_rows_per_step = Between(1, 20);
    options.block_size = 1 << Between(0, 4);
    options.num_kv_domains = Between(0, 3) == 0 ? Between(2, 3) : 1;
    options.num_kv_blocks = Between(1, std::max(2, 150 / options.block_size));
    if (Between(0, 2) == 0) options.policy = SchedulingPolicy::kPriority;
    options.share_prefixes = Between(0, 3) > 0;
    if (Between(0, 2) == 0) options.hash.num_bits = Between(0, 4);
    return options;
  }

  void AddRequest() {
    const int capacity = options_.num_kv_blocks * options_.block_size;
    Request request;
    const auto draw = [this](int low, int high) { return Draw(request_random_, low, high); };
    const int total = draw(1, draw(1, capacity));
    request.max_tokens = draw(0, total - 1);
    const SequenceId id = ++last_id_;
    // One of three families, or its own; then what is its own.
    const int num_prompt_tokens = total - request.max_tokens;
    const int num_shared_tokens = draw(0, num_prompt_tokens);
    const SequenceId family = 1000000 + draw(0, 2);
    for (int i = 0; i < num_prompt_tokens; ++i) {
      request.prompt_token_ids.push_back(TokenAt(i < num_shared_tokens ? family : id, i));
    }
    if (draw(0, 7) == 0) request.cache_salt = "salt";
    request.priority = draw(-2, 2);
    request.min_tokens = draw(0, request.max_tokens);
    request.wants_prompt_logprobs = draw(0, 3) == 0;
    if (draw(0, 1) == 0) request.eos_token_ids = {kEos};
    auto shared = std::make_shared<const Request>(std::move(request));
    live_[id] = {.request = shared};
    scheduler_.Add(id, shared);
  }

  void CancelSomething() {
    if (live_.empty()) return;
    auto victim = live_.begin();
    std::advance(victim, Between(0, static_cast<int>(live_.size()) - 1));
    EXPECT_TRUE(scheduler_.Cancel(victim->first));
    EXPECT_FALSE(scheduler_.Cancel(victim->first));
    live_.erase(victim);
  }

  void MakeStep() {
    const bool had_work = !live_.empty();
    Step step = scheduler_.Schedule();
    if (step.empty()) {
      EXPECT_TRUE(!had_work || !in_flight_.empty()) << "requests wait and nothing is done";
    } else {
      CheckBudgets(step);
      StepOutcome outcome = Work(step);
      in_flight_.push_back({std::move(step), std::move(outcome)});
    }
    const size_t wanted = in_flight_.empty() ? 0 : Between(0, max_steps_in_flight_ - 1);
    while (in_flight_.size() > wanted) CommitOldest();
  }

  void CheckBudgets(const Step& step) {
    int num_tokens = 0;
    int num_rows = 0;
    std::set<int> slots;
    for (const ScheduledSequence& s : step.scheduled) {
      EXPECT_GT(s.num_tokens, 0);
      EXPECT_TRUE(slots.insert(s.slot).second) << "slot " << s.slot << " twice in a step";
      num_tokens += s.num_tokens;
      num_rows += s.num_prompt_logprobs;
    }
    EXPECT_EQ(num_tokens, step.num_tokens);
    EXPECT_LE(num_tokens, options_.max_tokens_per_step);
    EXPECT_LE(num_rows, options_.max_prompt_logprob_rows_per_step);
    EXPECT_LE(scheduler_.num_running(), options_.max_sequences);
    EXPECT_LE(slots.size(), static_cast<size_t>(options_.max_sequences));
    // Nobody starts before someone who came earlier, or whose priority is lower if that counts.
    for (const AdmittedSequence& a : step.admitted) {
      live_.at(a.sequence->id).started = true;
      for (const auto& [id, live] : live_) {
        const bool comes_first = options_.policy == SchedulingPolicy::kPriority &&
                                         live.request->priority != a.sequence->request->priority
                                     ? live.request->priority < a.sequence->request->priority
                                     : id < a.sequence->id;
        EXPECT_TRUE(!comes_first || live.started) << id << " was overtaken";
      }
    }
  }

  // Does to its mirrors what a worker does, and answers.
  StepOutcome Work(const Step& step) {
    for (const int slot : step.released_slots) {
      EXPECT_EQ(mirrors_.erase(slot), 1u) << "slot " << slot << " was not in use";
    }
    for (const AdmittedSequence& a : step.admitted) {
      const bool is_new =
          mirrors_
              .emplace(a.sequence->slot, Mirror{.id = a.sequence->id,
                                                .kv_domain = a.sequence->kv_domain,
                                                .tokens = a.sequence->tokens.CopyFrom(0),
                                                .num_computed = a.num_computed,
                                                .has_fault = false,
                                                .blocks = {}})
              .second;
      EXPECT_TRUE(is_new) << "slot " << a.sequence->slot << " was in use";
    }
    StepOutcome outcome;
    size_t next_block = 0;
    for (const ScheduledSequence& s : step.scheduled) {
      Mirror& mirror = mirrors_.at(s.slot);
      EXPECT_EQ(mirror.id, s.id);
      for (int i = 0; i < s.num_new_blocks; ++i) {
        mirror.blocks.push_back(step.new_block_ids.at(next_block++));
      }
      if (mirror.has_fault) {
        outcome.sequences.emplace_back().fault =
            std::make_unique<absl::Status>(absl::InternalError("again"));
        continue;
      }
      EXPECT_EQ(mirror.num_computed, s.first_token) << "a gap or an overlap";
      mirror.num_computed += s.num_tokens;
      EXPECT_LE(mirror.num_computed, static_cast<int>(mirror.tokens.size()));
      EXPECT_GE(static_cast<int>(mirror.blocks.size()) * options_.block_size, mirror.num_computed);
      Compute(mirror, s.first_token);
      EXPECT_EQ(s.samples, mirror.num_computed == static_cast<int>(mirror.tokens.size()));
      SequenceOutcome& answer = outcome.sequences.emplace_back();
      const bool has_fault = has_random_faults_
                                 ? Between(0, 499) == 0
                                 : s.samples && HasFaultAt(s.id, mirror.tokens.size());
      if (has_fault) {
        answer.fault = std::make_unique<absl::Status>(absl::InternalError("fuzz"));
        mirror.has_fault = s.samples;
      } else if (s.samples) {
        answer.sampled_token_id = TokenAt(s.id, mirror.tokens.size());
        mirror.tokens.push_back(*answer.sampled_token_id);
      }
    }
    EXPECT_EQ(next_block, step.new_block_ids.size());
    CheckBlocks();
    return outcome;
  }

  bool HasFaultAt(SequenceId id, size_t position) const {
    return KvAfter(seed_ + id, static_cast<uint32_t>(position)) % 499 == 0;
  }

  // Reads the KV of the positions before `first`, and stores that of those from there on.
  void Compute(const Mirror& mirror, int first) {
    uint64_t expected = 0;
    for (int i = 0; i < mirror.num_computed; ++i) {
      const int32_t block = mirror.blocks.at(i / options_.block_size);
      ASSERT_TRUE(block >= 0 && block < options_.num_kv_blocks) << block;
      const size_t place = size_t{1} * mirror.kv_domain * options_.num_kv_blocks + block;
      uint64_t& kv = kv_.at(place * options_.block_size + i % options_.block_size);
      expected = KvAfter(expected, mirror.tokens.at(i));
      if (i < first) {
        ASSERT_EQ(kv, expected) << mirror.id << " reads what is not its own at position " << i;
      } else {
        kv = expected;
      }
    }
  }

  void CheckBlocks() {
    std::set<std::pair<int, int32_t>> taken;
    for (const auto& [slot, mirror] : mirrors_) {
      for (const int32_t block : mirror.blocks) {
        const bool is_new = taken.emplace(mirror.kv_domain, block).second;
        EXPECT_TRUE(is_new || options_.share_prefixes) << "block " << block << " has two owners";
      }
    }
    // Finished sequences are released with the next step only, so workers may hold more.
    EXPECT_GE(static_cast<int>(taken.size()),
              scheduler_.num_blocks() - scheduler_.num_free_blocks());
  }

  void CommitOldest() {
    const InFlight oldest = std::move(in_flight_.front());
    in_flight_.pop_front();
    std::map<SequenceId, int>::iterator ended;
    for (const ScheduledSequence& s : oldest.step.scheduled) {
      ended = num_rows_after_end_.find(s.id);
      if (ended == num_rows_after_end_.end()) continue;
      ++num_wasted_rows_;
      EXPECT_LT(++ended->second, max_steps_in_flight_) << s.id << " was scheduled after its end";
    }
    for (const SequenceUpdate& update : scheduler_.Commit(oldest.step, oldest.outcome)) {
      const ScheduledSequence& s = oldest.step.scheduled.at(update.batch_index);
      ASSERT_EQ(update.id, s.id);
      ASSERT_TRUE(live_.count(update.id)) << update.id << " has ended before";
      Live& live = live_.at(update.id);
      live.num_prompt_logprobs += s.num_prompt_logprobs;
      live.num_prompt_tokens += update.num_prompt_tokens_done;
      bool saw_eos = false;
      if (update.token_id.has_value()) {
        const uint32_t token = *update.token_id;
        EXPECT_EQ(token,
                  TokenAt(update.id, live.request->prompt_token_ids.size() + live.num_received));
        ++live.num_received;
        saw_eos = !live.request->eos_token_ids.empty() && token == kEos &&
                  static_cast<int>(live.num_received) >= live.request->min_tokens;
      }
      EXPECT_EQ(update.num_generated_tokens, static_cast<int>(live.num_received));
      CheckEnd(update, live, saw_eos);
      if (!update.end.has_value()) continue;
      outcomes_[update.id] = {.num_tokens = live.num_received,
                              .num_prompt_logprobs = live.num_prompt_logprobs,
                              .end = update.end};
      num_rows_after_end_[update.id] = 0;
      live_.erase(update.id);
    }
  }

  static void CheckEnd(const SequenceUpdate& update, const Live& live, bool saw_eos) {
    const int received = static_cast<int>(live.num_received);
    if (!update.end.has_value()) {
      EXPECT_FALSE(saw_eos);
      EXPECT_TRUE(received < live.request->max_tokens || live.request->max_tokens == 0);
      return;
    }
    if (*update.end == EndReason::kFault) return;
    EXPECT_EQ(*update.end == EndReason::kStop, saw_eos);
    if (*update.end == EndReason::kLength) {
      EXPECT_EQ(received, live.request->max_tokens);
    }
    EXPECT_EQ(live.num_prompt_tokens, live.request->num_prompt_tokens());
    if (live.request->wants_prompt_logprobs) {
      EXPECT_EQ(live.num_prompt_logprobs, live.request->num_prompt_tokens() - 1);
    }
  }

  const uint64_t seed_;
  std::mt19937_64 random_;
  const Scheduler::Options options_;
  std::mt19937_64 request_random_;
  const int max_steps_in_flight_;
  bool has_random_faults_ = false;  // at any time; else each has its place in a request
  Scheduler scheduler_;
  std::map<SequenceId, Live> live_;
  std::map<int, Mirror> mirrors_;
  std::deque<InFlight> in_flight_;
  std::vector<uint64_t> kv_;  // by domain, block and offset
  SequenceId last_id_ = 0;
  std::map<SequenceId, Outcome> outcomes_;
  std::map<SequenceId, int> num_rows_after_end_;
  int num_wasted_rows_ = 0;
};

TEST(SchedulerFuzzTest, KeepsItsBooksUnderRandomRequestsCancelsAndFaults) {
  const uint64_t base_seed = std::random_device()();
  int64_t num_found = 0;
  int64_t num_queried = 0;
  int64_t num_preemptions = 0;
  for (uint64_t seed = base_seed; seed < base_seed + 200; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    SchedulerFuzz fuzz(seed, static_cast<int>(seed % 3) + 1);
    fuzz.RunWithCancelsAndFaults();
    num_found += fuzz.prefix_figures().num_found;
    num_queried += fuzz.prefix_figures().num_queried;
    num_preemptions += fuzz.num_preemptions();
    if (HasFailure()) FAIL() << "with seed " << seed;
  }
  RecordProperty("base_seed", std::to_string(base_seed));
  EXPECT_GT(num_found, 0);
  std::cout << "seeds " << base_seed << " to " << base_seed + 199 << ": " << num_found << " of "
            << num_queried << " tokens found, " << num_preemptions << " preemptions\n";
}

TEST(SchedulerFuzzTest, AnswersTheSameWithOneStepInFlightAndWithMore) {
  const uint64_t base_seed = std::random_device()();
  std::cout << "seeds from " << base_seed << "\n";
  int num_wasted_rows = 0;
  for (uint64_t seed = base_seed; seed < base_seed + 100; ++seed) {
    std::map<SequenceId, Outcome> expected;
    for (const int max_steps_in_flight : {1, 2, 4}) {
      SCOPED_TRACE(::testing::Message()
                   << "seed " << seed << ", " << max_steps_in_flight << " in flight");
      SchedulerFuzz fuzz(seed, max_steps_in_flight);
      fuzz.Run(40);
      if (max_steps_in_flight == 1) {
        expected = fuzz.outcomes();
        EXPECT_EQ(fuzz.num_wasted_rows(), 0);
      }
      EXPECT_EQ(fuzz.outcomes().size(), 40);
      EXPECT_EQ(fuzz.outcomes(), expected);
      num_wasted_rows += fuzz.num_wasted_rows();
    }
    if (HasFailure()) FAIL() << "with seed " << seed;
  }
  EXPECT_GT(num_wasted_rows, 0);
}

}  // namespace
}  // namespace fathom
