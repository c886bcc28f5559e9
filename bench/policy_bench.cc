// What a policy does to clients, with neither workers nor time: the real Scheduler, whose steps
// take as long as a profile of simulated workers says (worker/sim_profile.h), on a clock of its
// own.
//
//   policy_bench --sim-profile bench/profiles/h200.json [--target-itl-ms 0,30] [--clients 1,8,…]
//   [--rounds 6] [--noise-us 100] [--seed 1] [--json]
//
// A closed loop of clients that begin a millisecond apart, each with --rounds requests of 2,048
// random prompt tokens and 512 to generate, as bench/serve_bench makes them; two steps in flight,
// and as many KV blocks as the profile has room for. Everything but the steps takes no time, so
// this is what a coordinator without a cost of its own would reach. The same numbers for the same
// flags, on any machine. With --noise-us every step takes longer by so much on average, as long as
// chance (exponential) and --seed have it: what the scheduler learns of costs must bear that.
//
// Printed are, of the time from when the last client has its first answer until the first one has
// all of its, the output tokens per second, their share of the bound, and how many sequences ran;
// and of all requests TTFT, the gaps between tokens and their ratio, in milliseconds. `late` is the
// share of gaps that are longer than the target, `error` that of the foretold step times.
//
// The bound is the profile's own. While n sequences make an answer each, where n is at most the
// number of clients and of those that the KV cache holds, there are 512 steps, some of which also
// read k tokens of the n prompts; they take what the profile says and nothing else; a client whose
// prompt is read does not decode meanwhile. n and k are the best ones; with a target a step that
// reads takes no longer than that, or 4/3 of one that only decodes, as the scheduler has it.
// (A share above 100 % is possible: the time that counts is a piece of a wave, since all clients
// began together.)
//
// TTFT: who finds no room in the KV cache waits for it. With c clients and n running (h200.json has
// room for 294 whole requests) c - n others are begun before a request is, r / 512 a second at r
// tokens per second:
//   clients   n    r      (c - n) * 512 / r   TTFT p50 here
//       512  290  6,573   17.3 s              17.6 s
//      1024  290  6,571   57.2 s              57.2 s
// So at 1,024 clients TTFT is little else, and no policy that keeps the cache full changes it.
//
// What no policy can do: a p99 of at most 1.5 times the median takes one of two things. Either no
// step with prompt tokens takes longer than that, and since the prompts of c clients must be read
// within the 512 steps of an answer, c * 2048 / 512 of their tokens fit into each. Or fewer than
// one gap in a hundred holds such a step: a client sees about half of those of the others as long
// as all begin and end together, as here, and all of them once they have drifted apart, as over a
// real network; so steps must read 200 c to 400 c tokens. With h200.json (8,192 tokens a step at
// most):
//   clients  decoding  with 4 c prompt tokens  with 200 c  the ratio reached here
//         8    6.3 ms           16 ms              36 ms   1.01, target 60 ms or none
//        16   10.0 ms           20 ms              67 ms   1.01, target 130 ms or none
//        32   15.3 ms           23 ms             133 ms   2.0, target 30 ms; 1.57, 24 ms
//        64   21.2 ms           26 ms                      1.43, target 30 ms; 1.34, 28 ms
// Nearly all experts are read for 64 tokens or more, so with 8 to 32 clients even a short piece of
// a prompt costs more than half of what decoding does, and small pieces cost throughput as well: at
// 32 clients 24 ms leave 80 % of it. Only holding prompts back until several can be read together
// would do more for p99, by longer gaps and a longer wait for the first token.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <iterator>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/flag_parser.h"
#include "coordinator/scheduler.h"
#include "worker/sim_profile.h"

namespace fathom {
namespace {

constexpr uint32_t kVocabSize = 129280;
constexpr double kMicrosecondsBetweenClients = 1000;
// How much longer a step with prompt tokens may take than one without: see coordinator/scheduler.h.
constexpr double kMostDecodingTimes = 4.0 / 3;

struct Flags {
  std::string profile;
  std::vector<double> target_itl_ms = {0};
  std::vector<int> clients = {1, 8, 16, 32, 64, 128, 256, 512, 1024};
  int max_num_seqs = 1024;
  int max_num_batched_tokens = 8192;
  int block_size = 16;
  int input_tokens = 2048;
  int output_tokens = 512;
  int rounds = 6;
  double noise_us = 0;
  uint64_t seed = 20250101;
  bool json = false;
};

double Percentile(std::vector<double>& values, double percent) {
  if (values.empty()) return 0;
  const auto rank = static_cast<size_t>(percent / 100 * static_cast<double>(values.size()));
  const auto place = values.begin() + static_cast<int64_t>(std::min(rank, values.size() - 1));
  std::nth_element(values.begin(), place, values.end());
  return *place;
}

// The most tokens per second that the profile allows to so many clients: see above.
double Bound(const Flags& flags, const SimProfile& profile, int num_clients, double target_us) {
  const double prompt = flags.input_tokens, output = flags.output_tokens;
  const double length = prompt + output / 2;
  const double room =
      std::min<double>({static_cast<double>(num_clients), static_cast<double>(flags.max_num_seqs),
                        static_cast<double>(profile.kv_cache_tokens) / length});
  constexpr int kParts = 40;
  double best = 0;
  for (int part = 1; part <= kParts; ++part) {
    const double decoding = room * part / kParts;
    const auto step_us = [&](double prompt_tokens) {
      return StepMicroseconds(profile,
                              {.tokens = decoding + prompt_tokens,
                               .sequences = decoding + prompt_tokens / prompt,
                               .context_tokens = decoding * length + prompt_tokens / 2,
                               .attention_pairs = decoding * length + prompt_tokens * prompt / 2});
    };
    const double alone = step_us(0);
    const double most_us =
        target_us > 0 ? std::max(target_us, kMostDecodingTimes * alone) : HUGE_VAL;
    for (int chunk = 1; chunk <= flags.max_num_batched_tokens - decoding; ++chunk) {
      const double num_reading = decoding * prompt / chunk;
      const double reading_us = step_us(chunk);
      if (num_reading < 1 || num_reading > output || reading_us > most_us) continue;
      const double total_us = num_reading * reading_us + (output - num_reading) * alone;
      const double being_read = num_reading * reading_us * std::max(1.0, chunk / prompt) / total_us;
      if (decoding + being_read > num_clients) continue;
      best = std::max(best, 1e6 * decoding * output / total_us);
    }
  }
  return best;
}

class ClosedLoop {
 public:
  ClosedLoop(const Flags& flags, const SimProfile& profile, int num_clients, double target_itl_ms);

  void Run();
  void Print();

 private:
  struct Client {
    int num_requests = 0;  // that it has begun
    double arrived = 0;
    double last_token = -1;  // of this request; none yet
  };
  struct InFlight {
    Step step;
    double end;
    double microseconds;
  };
  // Sums up to some time.
  struct Figures {
    double time = 0;
    double num_tokens = 0;
    double running_us = 0;  // sequences in slots, times how long
  };

  void BeginClients();
  void Request(int client);
  double Microseconds(const Step& step);
  void Commit(const InFlight& made);

  const Flags flags_;
  const SimProfile profile_;
  const double target_us_;
  std::mt19937_64 random_;
  Scheduler scheduler_;
  SequenceId last_id_ = 0;
  std::vector<Client> clients_;
  std::unordered_map<SequenceId, int> client_of_;
  int num_begun_ = 0;
  int num_ready_ = 0;  // clients with an answer
  Figures now_;        // microseconds, as all times here
  std::optional<Figures> steady_from_, steady_until_;
  std::vector<double> ttft_;
  std::vector<double> itl_;
};

ClosedLoop::ClosedLoop(const Flags& flags, const SimProfile& profile, int num_clients,
                       double target_itl_ms)
    : flags_(flags),
      profile_(profile),
      target_us_(target_itl_ms * 1e3),
      random_(flags.seed),
      scheduler_({.max_tokens_per_step = flags.max_num_batched_tokens,
                  .max_sequences = flags.max_num_seqs,
                  .block_size = flags.block_size,
                  .num_kv_blocks = static_cast<int>(profile.kv_cache_tokens / flags.block_size),
                  .target_step_us = target_us_,
                  .share_prefixes = true}),
      clients_(num_clients) {}

// Those whose time has come.
void ClosedLoop::BeginClients() {
  while (num_begun_ < std::ssize(clients_) &&
         num_begun_ * kMicrosecondsBetweenClients <= now_.time) {
    Request(num_begun_++);
  }
}

void ClosedLoop::Request(int client) {
  auto request = std::make_shared<fathom::Request>();
  for (int i = 0; i < flags_.input_tokens; ++i) {
    request->prompt_token_ids.push_back(static_cast<uint32_t>(random_() % kVocabSize));
  }
  request->max_tokens = flags_.output_tokens;
  scheduler_.Add(++last_id_, std::move(request));
  client_of_[last_id_] = client;
  clients_[client] = {.num_requests = clients_[client].num_requests + 1, .arrived = now_.time};
}

double ClosedLoop::Microseconds(const Step& step) {
  StepLoad load;
  for (const ScheduledSequence& s : step.scheduled) load.Add(s.num_tokens, s.first_token);
  const double noise =
      flags_.noise_us > 0 ? std::exponential_distribution(1 / flags_.noise_us)(random_) : 0;
  return noise + StepMicroseconds(profile_, {.tokens = load.tokens,
                                             .sequences = load.sequences,
                                             .context_tokens = load.context_tokens,
                                             .attention_pairs = load.attention_pairs});
}

void ClosedLoop::Run() {
  constexpr size_t kMaxStepsInFlight = 2;
  std::deque<InFlight> in_flight;
  double workers_free_at = 0;
  BeginClients();
  while (!client_of_.empty() || num_begun_ < std::ssize(clients_)) {
    if (in_flight.size() < kMaxStepsInFlight) {
      Step step = scheduler_.Schedule();
      if (!step.empty()) {
        const double microseconds = Microseconds(step);
        workers_free_at = std::max(workers_free_at, now_.time) + microseconds;
        in_flight.push_back({std::move(step), workers_free_at, microseconds});
        continue;
      }
    }
    if (in_flight.empty()) {
      now_.time = num_begun_ * kMicrosecondsBetweenClients;
    } else {
      const InFlight made = std::move(in_flight.front());
      in_flight.pop_front();
      now_.time = made.end;
      Commit(made);
    }
    BeginClients();
  }
}

void ClosedLoop::Commit(const InFlight& made) {
  now_.running_us += scheduler_.num_running() * made.microseconds;
  StepOutcome outcome{.compute_us = made.microseconds, .sequences = {}};
  for (const ScheduledSequence& s : made.step.scheduled) {
    SequenceOutcome& sequence = outcome.sequences.emplace_back();
    if (s.samples) sequence.sampled_token_id = static_cast<uint32_t>(random_() % kVocabSize);
  }
  for (const SequenceUpdate& update : scheduler_.Commit(made.step, outcome)) {
    if (!update.token_id.has_value()) continue;
    const int index = client_of_.at(update.id);
    Client& client = clients_[index];
    if (client.last_token < 0) {
      ttft_.push_back(now_.time - client.arrived);
    } else {
      itl_.push_back(now_.time - client.last_token);
    }
    client.last_token = now_.time;
    ++now_.num_tokens;
    if (!update.end.has_value()) continue;
    client_of_.erase(update.id);
    if (client.num_requests == 1 && ++num_ready_ == std::ssize(clients_)) steady_from_ = now_;
    if (client.num_requests < flags_.rounds) {
      Request(index);
    } else if (!steady_until_.has_value()) {
      steady_until_ = now_;
    }
  }
}

void ClosedLoop::Print() {
  const auto num_clients = static_cast<int>(clients_.size());
  const double target_ms = target_us_ / 1e3;
  if (!steady_from_.has_value() || steady_until_->time <= steady_from_->time) {
    std::fprintf(stderr, "policy_bench: %d clients make too few --rounds\n", num_clients);
    return;
  }
  const Figures &from = *steady_from_, &until = *steady_until_;
  const double duration = until.time - from.time;
  const double rate = 1e6 * (until.num_tokens - from.num_tokens) / duration;
  const double running = (until.running_us - from.running_us) / duration;
  const double bound = Bound(flags_, profile_, num_clients, target_us_);
  const auto late = std::count_if(itl_.begin(), itl_.end(), [&](double gap) {
    return target_us_ > 0 && gap > 1.01 * target_us_;
  });
  const double late_share = static_cast<double>(late) / static_cast<double>(itl_.size());
  const double ttft = Percentile(ttft_, 50) / 1e3, ttft_p99 = Percentile(ttft_, 99) / 1e3;
  const double itl = Percentile(itl_, 50) / 1e3, itl_p99 = Percentile(itl_, 99) / 1e3;
  if (flags_.json) {
    std::printf(
        "{\"target_itl_ms\": %g, \"clients\": %d, \"tokens_per_second\": %.1f, \"bound\": %.1f, "
        "\"running\": %.1f, \"ttft_ms_p50\": %.1f, \"ttft_ms_p99\": %.1f, \"itl_ms_p50\": %.2f, "
        "\"itl_ms_p99\": %.2f}\n",
        target_ms, num_clients, rate, bound, running, ttft, ttft_p99, itl, itl_p99);
  } else {
    std::printf("%7.1f %7d %8.0f %8.1f%% %8.1f %9.0f %9.0f %8.2f %8.2f %6.2f %6.2f%% %6.2f%%\n",
                target_ms, num_clients, rate, 100 * rate / bound, running, ttft, ttft_p99, itl,
                itl_p99, itl_p99 / itl, 100 * late_share,
                100 * scheduler_.step_cost().mean_error());
  }
  std::fflush(stdout);
}

int Main(int argc, char** argv) {
  Flags flags;
  FlagParser parser("Shows what a scheduling policy does to clients, on a clock of its own.",
                    "policy_bench");
  parser.Add("--sim-profile", flags.profile, "how long steps take").Required();
  parser.Add("--target-itl-ms", flags.target_itl_ms, "as of fathom-coordinator; 0: none")
      .SplitAtCommas();
  parser.Add("--clients", flags.clients).SplitAtCommas().Between(1, 1 << 16);
  parser.Add("--max-num-seqs", flags.max_num_seqs).Between(1, 65536);
  parser.Add("--max-num-batched-tokens", flags.max_num_batched_tokens).Between(1, 1 << 20);
  parser.Add("--block-size", flags.block_size).Between(1, 128);
  parser.Add("--input-tokens", flags.input_tokens).Between(1, 1 << 20);
  parser.Add("--output-tokens", flags.output_tokens).Between(1, 1 << 20);
  parser.Add("--rounds", flags.rounds, "requests of each client").Between(2, 1000);
  parser.Add("--noise-us", flags.noise_us, "that a step takes longer, on average")
      .Between(0.0, 1e6);
  parser.Add("--seed", flags.seed, "of prompts and noise");
  parser.AddSwitch("--json", flags.json, "one JSON object per row");
  if (const std::optional<int> code = parser.Parse(argc, argv)) return *code;

  std::ifstream file(flags.profile);
  const std::string json{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const absl::StatusOr<SimProfile> profile = ParseSimProfile(json);
  if (!profile.ok()) {
    std::fprintf(stderr, "policy_bench: %s: %s\n", flags.profile.c_str(),
                 std::string(profile.status().message()).c_str());
    return EXIT_FAILURE;
  }
  if (!flags.json) {
    std::printf("%7s %7s %8s %9s %8s %9s %9s %8s %8s %6s %7s %7s\n", "target", "clients",
                "tokens/s", "of bound", "running", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99",
                "ratio", "late", "error");
  }
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
