// What a step costs in the coordinator: the real Scheduler, BlockPool and step_command, no network.
//
//   coordinator_bench [--sequences 1,8,…] [--block-sizes 1,16,64] [--steps 1000] [--turnover]
//   [--no-enable-prefix-caching] [--json]
//
// A step is: schedule (Scheduler::Schedule), encode (EncodeStep and its bytes for the workers),
// commit (the bytes of rank 0's result taken apart, DecodeResult, Scheduler::Commit). What the
// workers do in between is not timed. All sequences decode and have 2,304 tokens halfway through
// the steps that count; their lengths differ by up to 64 tokens, so that they do not all want a
// block in the same step. What the step filled is published for others after it was sent, while
// the workers compute: `publish` is no part of the total. With --turnover a sequence ends after 512
// tokens, and another one with a prompt of 2,048 takes its place: then 2,304 is the mean, and
// admissions count too. Blocks are published for others as they fill, but no two requests begin
// alike.
//
// Prints percentiles in microseconds, the bytes of a command, and which share of a step of 20 ms
// (1,024 streams at 50 tokens per second) the median is. With --json one object per row instead.
// A step in which the operating system gave the core to another program says nothing about the
// coordinator: such steps are counted (`interrupted`) and left out.

#include <sys/resource.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/flag_parser.h"
#include "coordinator/scheduler.h"
#include "coordinator/step_command.h"

namespace fathom {
namespace {

constexpr int kTokensPerSequence = 2304;
constexpr int kTurnoverPromptTokens = 2048;
constexpr int kTurnoverOutputTokens = 512;
constexpr int kLengthSpread = 64;
constexpr int kWarmUpSteps = 50;
constexpr uint32_t kVocabSize = 129280;
constexpr double kReferenceStepMicroseconds = 20e3;

struct Flags {
  std::vector<int> sequences = {1, 8, 64, 256, 512, 1024, 2048, 4096};
  std::vector<int> block_sizes = {1, 16, 64};
  int steps = 1000;
  bool turnover = false;
  bool enable_prefix_caching = true;
  bool json = false;
};

// Microseconds of one step.
struct StepCost {
  double schedule = 0;
  double encode = 0;
  double commit = 0;
  double publish = 0;
  double total() const { return schedule + encode + commit; }
};

// Calls `work` and says how many microseconds it took.
template <typename Work>
double Microseconds(Work work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
      .count();
}

// How often another program got this thread's core.
int64_t NumInterruptions() {
  rusage usage;
  CHECK_EQ(getrusage(RUSAGE_THREAD, &usage), 0);
  return usage.ru_nivcsw;
}

// Of `part` of the costs; by nearest rank.
template <typename Part>
double Percentile(const std::vector<StepCost>& costs, double percent, Part part) {
  std::vector<double> values;
  for (const StepCost& cost : costs) values.push_back(part(cost));
  const auto rank = static_cast<size_t>(percent / 100 * static_cast<double>(values.size()));
  const auto place = values.begin() + std::min(rank, values.size() - 1);
  std::nth_element(values.begin(), place, values.end());
  return *place;
}

// A scheduler with so many running sequences, and workers that answer with random tokens.
class Coordinator {
 public:
  Coordinator(const Flags& flags, int num_sequences, int block_size);

  StepCost MakeStep();
  size_t command_bytes() const { return command_.size(); }

 private:
  static Scheduler::Options SchedulerOptions(const Flags& flags, int num_sequences, int block_size);
  std::shared_ptr<Request> MakeRequest(int num_prompt_tokens, int max_tokens);
  std::string Answer(const Step& step);

  const bool has_turnover_;
  std::mt19937_64 random_{20250101};
  Scheduler scheduler_;
  SequenceId last_id_ = 0;
  std::string command_;  // of the last step
};

Scheduler::Options Coordinator::SchedulerOptions(const Flags& flags, int num_sequences,
                                                 int block_size) {
  // Room for all of them at their longest; a step may read all prompts, so that setting up is
  // brief.
  const int longest = std::max(kTokensPerSequence + kWarmUpSteps + flags.steps,
                               kTurnoverPromptTokens + kTurnoverOutputTokens) +
                      kLengthSpread;
  return {.max_tokens_per_step = num_sequences * longest,
          .max_sequences = num_sequences,
          .block_size = block_size,
          .num_kv_blocks = num_sequences * ((longest + block_size - 1) / block_size + 1),
          .share_prefixes = flags.enable_prefix_caching};
}

Coordinator::Coordinator(const Flags& flags, int num_sequences, int block_size)
    : has_turnover_(flags.turnover),
      scheduler_(SchedulerOptions(flags, num_sequences, block_size)) {
  std::uniform_int_distribution<int> spread(0, kLengthSpread);
  for (int i = 0; i < num_sequences; ++i) {
    std::shared_ptr<Request> request;
    if (has_turnover_) {  // as if they had been at it for a while, each for another while
      const int num_done = kTurnoverOutputTokens * i / num_sequences;
      request = MakeRequest(kTurnoverPromptTokens + num_done, kTurnoverOutputTokens - num_done);
    } else {
      const int num_steps = kWarmUpSteps + flags.steps;
      const int halfway = kTokensPerSequence - kLengthSpread / 2;
      request = MakeRequest(std::max(1, halfway - num_steps / 2) + spread(random_), num_steps + 1);
    }
    scheduler_.Add(++last_id_, std::move(request));
  }
  for (int i = 0; i < kWarmUpSteps; ++i) MakeStep();
  CHECK_EQ(scheduler_.num_running() + scheduler_.num_waiting(), num_sequences);
}

std::shared_ptr<Request> Coordinator::MakeRequest(int num_prompt_tokens, int max_tokens) {
  auto request = std::make_shared<Request>();
  for (int i = 0; i < num_prompt_tokens; ++i) {
    request->prompt_token_ids.push_back(static_cast<uint32_t>(random_() % kVocabSize));
  }
  request->max_tokens = max_tokens;
  request->sampling.set_seed(random_());
  request->sampling.set_temperature(1.0f);
  return request;
}

std::string Coordinator::Answer(const Step& step) {
  v1::StepResult result;
  result.set_step(step.number);
  result.set_compute_us(static_cast<uint64_t>(kReferenceStepMicroseconds));
  for (const ScheduledSequence& scheduled : step.scheduled) {
    if (!scheduled.samples) continue;
    result.add_sampled_slots(scheduled.slot);
    result.add_sampled_token_ids(static_cast<uint32_t>(random_() % kVocabSize));
  }
  return result.SerializeAsString();
}

StepCost Coordinator::MakeStep() {
  Step step;
  std::vector<SequenceUpdate> updates;
  StepCost cost;
  cost.schedule = Microseconds([&] { step = scheduler_.Schedule(); });
  cost.encode = Microseconds([&] { command_ = EncodeStep(step, /*epoch=*/1).SerializeAsString(); });
  cost.publish = Microseconds([&] { scheduler_.PublishFullBlocks(); });
  const std::string answer = Answer(step);
  cost.commit = Microseconds([&] {
    v1::StepResult result;
    CHECK(result.ParseFromString(answer));
    absl::StatusOr<StepAnswer> decoded = DecodeResult(step, kVocabSize, std::move(result));
    CHECK(decoded.ok()) << decoded.status();
    updates = scheduler_.Commit(step, decoded->outcome);
  });
  for (const SequenceUpdate& update : updates) {
    if (!update.end.has_value()) continue;
    CHECK(has_turnover_);
    scheduler_.Add(++last_id_, MakeRequest(kTurnoverPromptTokens, kTurnoverOutputTokens));
  }
  return cost;
}

void PrintRow(const Flags& flags, int num_sequences, int block_size) {
  Coordinator coordinator(flags, num_sequences, block_size);
  std::vector<StepCost> costs;
  for (int i = 0; i < flags.steps; ++i) {
    const int64_t interruptions = NumInterruptions();
    const StepCost cost = coordinator.MakeStep();
    if (NumInterruptions() == interruptions) costs.push_back(cost);
  }
  CHECK(!costs.empty())
      << "every step was interrupted: the machine is too busy to measure anything";
  const int num_interrupted = flags.steps - static_cast<int>(costs.size());

  const auto total = [](const StepCost& cost) { return cost.total(); };
  const double total_p50 = Percentile(costs, 50, total);
  const double total_p99 = Percentile(costs, 99, total);
  const double schedule_p50 = Percentile(costs, 50, [](const StepCost& c) { return c.schedule; });
  const double encode_p50 = Percentile(costs, 50, [](const StepCost& c) { return c.encode; });
  const double commit_p50 = Percentile(costs, 50, [](const StepCost& c) { return c.commit; });
  const double publish_p50 = Percentile(costs, 50, [](const StepCost& c) { return c.publish; });
  if (flags.json) {
    std::printf(
        "{\"sequences\": %d, \"block_size\": %d, \"total_us_p50\": %.2f, \"total_us_p99\": %.2f, "
        "\"schedule_us_p50\": %.2f, \"encode_us_p50\": %.2f, \"commit_us_p50\": %.2f, "
        "\"publish_us_p50\": %.2f, \"command_bytes\": %zu, \"steps\": %zu, \"interrupted\": %d, "
        "\"turnover\": %s}\n",
        num_sequences, block_size, total_p50, total_p99, schedule_p50, encode_p50, commit_p50,
        publish_p50, coordinator.command_bytes(), costs.size(), num_interrupted,
        flags.turnover ? "true" : "false");
  } else {
    std::printf("%9d %10d %9.1f %9.1f %9.1f %9.1f %9.1f %9.1f %13zu %11d %7.2f%%\n", num_sequences,
                block_size, schedule_p50, encode_p50, commit_p50, total_p50, total_p99, publish_p50,
                coordinator.command_bytes(), num_interrupted,
                100 * total_p50 / kReferenceStepMicroseconds);
  }
  std::fflush(stdout);
}

int Main(int argc, char** argv) {
  Flags flags;
  FlagParser parser("Measures what a step costs in the coordinator.", "coordinator_bench");
  parser.Add("--sequences", flags.sequences, "how many run").SplitAtCommas().Between(1, 65536);
  parser.Add("--block-sizes", flags.block_sizes, "tokens per KV block")
      .SplitAtCommas()
      .Between(1, 1024);
  parser.Add("--steps", flags.steps, "that count, of each row").Between(1, 4000);
  parser.AddSwitch("--turnover", flags.turnover, "sequences end and others take their places");
  parser.AddSwitch("--enable-prefix-caching,!--no-enable-prefix-caching",
                   flags.enable_prefix_caching, "publish full blocks for others [on]");
  parser.AddSwitch("--json", flags.json, "one JSON object per row");
  if (const std::optional<int> code = parser.Parse(argc, argv)) return *code;

  if (!flags.json) {
    std::printf("%9s %10s %9s %9s %9s %9s %9s %9s %13s %11s %8s\n", "sequences", "block_size",
                "schedule", "encode", "commit", "total p50", "total p99", "publish",
                "command_bytes", "interrupted", "of 20 ms");
  }
  for (const int block_size : flags.block_sizes) {
    for (const int num_sequences : flags.sequences) PrintRow(flags, num_sequences, block_size);
  }
  return EXIT_SUCCESS;
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) { return fathom::Main(argc, argv); }
