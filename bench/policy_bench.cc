// What a policy does to clients, with neither workers nor time: the real Scheduler, whose steps
// take as long as a profile of simulated workers says (worker/sim_profile.h), on a clock of its
// own.
//
//   policy_bench --sim-profile bench/profiles/h200.json [--target-itl-ms 0,30] [--clients 1,8,…]
//
// A closed loop of clients, each with four requests of 2,048 random prompt tokens and 512 to
// generate, as bench/serve_bench makes them; two steps in flight. Everything but the steps takes no
// time, so this is what a coordinator without a cost of its own would reach. Printed are the output
// tokens per second, and their share of what the profile allows at best: as many sequences as there
// is room for, decoding together all the time, with their prompts read in whole steps between.
// TTFT counts from the request, in milliseconds as all times. `late` is the share of gaps between
// tokens that are longer than the target, `error` that of the foretold step times. The same numbers
// for the same flags, on any machine.
//
// What no policy can do: a p99 of at most 1.5 times the median takes one of two things. Either no
// step with prompt tokens takes longer than that, and since the prompts of c clients must be read
// within the 512 steps of an answer, c * 2048 / 512 of their tokens fit into each. Or fewer than
// one gap in a hundred holds such a step: a client sees about half of those of the others as long
// as all begin and end together, as here, and all of them once they have drifted apart, as over a
// real network; so steps must read 200 c to 400 c tokens. With h200.json (8,192 tokens a step at
// most):
//   clients  decoding  with 4 c prompt tokens  with 200 c  the ratio reached here
//         8    6.3 ms           16 ms              36 ms   1.01, target 40 ms or none
//        16   10.0 ms           20 ms              67 ms   1.01, no target
//        32   15.3 ms           23 ms             133 ms   2.0, target 30 ms; 1.57, 24 ms
//        64   21.2 ms           26 ms                      1.45, target 30 ms
// Nearly all experts are read for 64 tokens or more, so with 8 to 32 clients even a short piece of
// a prompt costs more than half of what decoding does, and small pieces cost throughput as well: at
// 32 clients 24 ms leave 80 % of it. Only holding prompts back until several can be read together
// would do more for p99, by longer gaps and a longer wait for the first token.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "coordinator/scheduler.h"
#include "worker/sim_profile.h"

namespace fathom {
namespace {

constexpr uint32_t kVocabSize = 129280;
constexpr int kRequestsPerClient = 4;

struct Flags {
  std::string profile;
  std::vector<double> target_itl_ms = {0};
  std::vector<int> clients = {1, 8, 16, 32, 64, 128, 256, 512, 1024};
  int max_num_seqs = 256;
  int max_num_batched_tokens = 2048;
  int block_size = 64;
  int input_tokens = 2048;
  int output_tokens = 512;
};

double Microseconds(const SimProfile& profile, const StepLoad& load) {
  return StepMicroseconds(profile, {.tokens = load.tokens,
                                    .sequences = load.sequences,
                                    .context_tokens = load.context_tokens,
                                    .attention_pairs = load.attention_pairs});
}

double Percentile(std::vector<double>& values, double percent) {
  if (values.empty()) return 0;
  const auto rank = static_cast<size_t>(percent / 100 * static_cast<double>(values.size()));
  const auto place = values.begin() + static_cast<int64_t>(std::min(rank, values.size() - 1));
  std::nth_element(values.begin(), place, values.end());
  return *place;
}

class ClosedLoop {
 public:
  ClosedLoop(const Flags& flags, const SimProfile& profile, int num_clients, double target_itl_ms);

  void Run();
  void Print();

 private:
  struct Client {
    double arrived = 0;
    double last_token = -1;  // none yet
  };
  struct InFlight {
    Step step;
    double end;
    double microseconds;
  };

  void Add();
  void Commit(const InFlight& made);
  double BestTokensPerSecond() const;

  const Flags flags_;
  const SimProfile profile_;
  const int num_clients_;
  const double target_us_;
  std::mt19937_64 random_{20250101};
  Scheduler scheduler_;
  SequenceId last_id_ = 0;
  std::unordered_map<SequenceId, Client> clients_;
  double now_ = 0;  // microseconds, as all times here
  int64_t num_tokens_ = 0;
  std::vector<double> ttft_;
  std::vector<double> itl_;
};

ClosedLoop::ClosedLoop(const Flags& flags, const SimProfile& profile, int num_clients,
                       double target_itl_ms)
    : flags_(flags),
      profile_(profile),
      num_clients_(num_clients),
      target_us_(target_itl_ms * 1e3),
      scheduler_({.max_tokens_per_step = flags.max_num_batched_tokens,
                  .max_sequences = flags.max_num_seqs,
                  .block_size = flags.block_size,
                  .num_kv_blocks = static_cast<int>(profile.kv_cache_tokens / flags.block_size),
                  .target_step_us = target_us_,
                  .share_prefixes = true}) {
  for (int i = 0; i < num_clients; ++i) Add();
}

void ClosedLoop::Add() {
  auto request = std::make_shared<Request>();
  for (int i = 0; i < flags_.input_tokens; ++i) {
    request->prompt_token_ids.push_back(static_cast<uint32_t>(random_() % kVocabSize));
  }
  request->max_tokens = flags_.output_tokens;
  scheduler_.Add(++last_id_, std::move(request));
  clients_[last_id_] = {.arrived = now_};
}

void ClosedLoop::Run() {
  constexpr size_t kMaxStepsInFlight = 2;
  std::deque<InFlight> in_flight;
  double workers_free_at = 0;
  while (!clients_.empty()) {
    if (in_flight.size() < kMaxStepsInFlight) {
      Step step = scheduler_.Schedule();
      if (!step.empty()) {
        StepLoad load;
        for (const ScheduledSequence& s : step.scheduled) load.Add(s.num_tokens, s.first_token);
        const double microseconds = Microseconds(profile_, load);
        workers_free_at = std::max(workers_free_at, now_) + microseconds;
        in_flight.push_back({std::move(step), workers_free_at, microseconds});
        continue;
      }
    }
    const InFlight made = std::move(in_flight.front());
    in_flight.pop_front();
    now_ = made.end;
    Commit(made);
  }
}

void ClosedLoop::Commit(const InFlight& made) {
  StepOutcome outcome{.number = made.step.number, .compute_us = made.microseconds, .sequences = {}};
  for (const ScheduledSequence& s : made.step.scheduled) {
    SequenceOutcome& sequence = outcome.sequences.emplace_back();
    if (s.samples) sequence.sampled_token_id = static_cast<uint32_t>(random_() % kVocabSize);
  }
  for (const SequenceUpdate& update : scheduler_.Commit(outcome)) {
    if (update.token_ids.empty()) continue;
    Client& client = clients_.at(update.id);
    if (client.last_token < 0) {
      ttft_.push_back(now_ - client.arrived);
    } else {
      itl_.push_back(now_ - client.last_token);
    }
    client.last_token = now_;
    ++num_tokens_;
    if (!update.end.has_value()) continue;
    clients_.erase(update.id);
    if (last_id_ < static_cast<SequenceId>(num_clients_ * kRequestsPerClient)) Add();
  }
}

// As many answers as fit beside each other take as long as their tokens, decoded together, and
// what their prompts add to such steps.
double ClosedLoop::BestTokensPerSecond() const {
  const int64_t most_in_cache =
      profile_.kv_cache_tokens / (flags_.input_tokens + flags_.output_tokens);
  const auto batch = static_cast<int>(
      std::min<int64_t>({num_clients_, flags_.max_num_seqs, std::max<int64_t>(1, most_in_cache)}));
  double microseconds = 0;
  StepLoad decoding;
  for (int i = 0; i < batch; ++i) {
    decoding.Add(1, flags_.input_tokens + flags_.output_tokens * i / batch);
  }
  const double one_step = Microseconds(profile_, decoding);
  StepLoad with_prompt = decoding;
  const int chunk = std::min(flags_.input_tokens, flags_.max_num_batched_tokens);
  with_prompt.Add(chunk, 0);
  const double one_prompt = (Microseconds(profile_, with_prompt) - one_step) * flags_.input_tokens /
                            static_cast<double>(chunk);
  microseconds = flags_.output_tokens * one_step + batch * one_prompt;
  return 1e6 * batch * flags_.output_tokens / microseconds;
}

void ClosedLoop::Print() {
  const double tokens_per_second = 1e6 * static_cast<double>(num_tokens_) / now_;
  const auto late = std::count_if(itl_.begin(), itl_.end(), [&](double gap) {
    return target_us_ > 0 && gap > 1.01 * target_us_;
  });
  const double median = Percentile(itl_, 50), p99 = Percentile(itl_, 99);
  std::printf(
      "%7.1f %7d %9.0f %6.1f%% %9.0f %9.0f %9.2f %9.2f %6.2f %6.2f%% %6.2f%%\n", target_us_ / 1e3,
      num_clients_, tokens_per_second, 100 * tokens_per_second / BestTokensPerSecond(),
      Percentile(ttft_, 50) / 1e3, Percentile(ttft_, 99) / 1e3, median / 1e3, p99 / 1e3,
      p99 / median,
      100.0 * static_cast<double>(late) / static_cast<double>(std::max<size_t>(1, itl_.size())),
      100 * scheduler_.step_cost().mean_error());
  std::fflush(stdout);
}

int Main(int argc, char** argv) {
  Flags flags;
  CLI::App app("Shows what a scheduling policy does to clients, on a clock of its own.",
               "policy_bench");
  app.add_option("--sim-profile", flags.profile, "how long steps take")->required();
  app.add_option("--target-itl-ms", flags.target_itl_ms, "as of fathom-coordinator; 0: none")
      ->delimiter(',');
  app.add_option("--clients", flags.clients)->delimiter(',')->check(CLI::Range(1, 1 << 16));
  app.add_option("--max-num-seqs", flags.max_num_seqs)->check(CLI::Range(1, 65536));
  app.add_option("--max-num-batched-tokens", flags.max_num_batched_tokens)
      ->check(CLI::Range(1, 1 << 20));
  app.add_option("--block-size", flags.block_size)->check(CLI::Range(1, 128));
  app.add_option("--input-tokens", flags.input_tokens)->check(CLI::Range(1, 1 << 20));
  app.add_option("--output-tokens", flags.output_tokens)->check(CLI::Range(1, 1 << 20));
  CLI11_PARSE(app, argc, argv);

  std::ifstream file(flags.profile);
  const std::string json{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const absl::StatusOr<SimProfile> profile = ParseSimProfile(json);
  if (!profile.ok()) {
    std::fprintf(stderr, "policy_bench: %s: %s\n", flags.profile.c_str(),
                 std::string(profile.status().message()).c_str());
    return EXIT_FAILURE;
  }
  std::printf("%7s %7s %9s %7s %9s %9s %9s %9s %6s %7s %7s\n", "target", "clients", "tokens/s",
              "of best", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "ratio", "late", "error");
  for (const double target : flags.target_itl_ms) {
    for (const int num_clients : flags.clients) {
      ClosedLoop loop(flags, *profile, num_clients, target);
      loop.Run();
      loop.Print();
    }
  }
  return EXIT_SUCCESS;
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) { return fathom::Main(argc, argv); }
