// Clients of simulated workers: what they ask, and whether what they get is right.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "worker/sim_token.h"

namespace fathom {

struct SimClientsOptions {
  int streams = 1024;
  int rounds = 1;  // requests of each
  int prompt_tokens = 16;
  int output_tokens = 400;
  int vocab_size = 129280;         // DeepSeek-V3's
  std::vector<int> eos_ids = {1};  // ascending
  uint64_t seed = 0;
  double ideal_step_ms = 0;
  bool staggered = false;
  double pause_ms = 0;
};

using Figures = std::vector<std::pair<std::string, double>>;

// Not thread-safe.
class SimClients {
 public:
  using Clock = std::chrono::steady_clock;
  using TokenIds = std::vector<uint32_t>;

  explicit SimClients(SimClientsOptions options)
      : options_(std::move(options)), random_(options_.seed), clients_(options_.streams) {}

  // The prompt of a client's next request; empty when it has made all.
  TokenIds Begin(int index) {
    Client& client = clients_[index];
    if (client.rounds == options_.rounds) return {};
    ++client.rounds;
    client.prefix = {};
    client.num_tokens = 0;
    client.began = Clock::now();
    TokenIds prompt;
    for (int i = 0; i < options_.prompt_tokens; ++i) {
      prompt.push_back(static_cast<uint32_t>(random_() % options_.vocab_size));
      client.prefix.Append(static_cast<int32_t>(prompt.back()));
    }
    if (first_request_ == Clock::time_point()) first_request_ = client.began;
    return prompt;
  }

  // When a client makes its next request.
  Clock::time_point NextRequestAt() {
    std::uniform_real_distribution<double> pause_ms(0, options_.pause_ms);
    return Clock::now() + std::chrono::microseconds(static_cast<int>(1e3 * pause_ms(random_)));
  }

  // How many tokens a client's current request asks for.
  int OutputTokens(int index) const {
    if (!options_.staggered || clients_[index].rounds > 1) return options_.output_tokens;
    return 1 + static_cast<int>(int64_t{options_.output_tokens - 1} * index / options_.streams);
  }

  void OnTokens(int index, absl::Span<const uint32_t> token_ids, Clock::time_point now) {
    Client& client = clients_[index];
    for (const uint32_t token_id : token_ids) {
      const auto expected =
          static_cast<uint32_t>(client.prefix.NextToken(options_.vocab_size, options_.eos_ids));
      if (token_id != expected && ++num_wrong_ <= 10) {
        std::fprintf(stderr, "stream %d: token %d is %u, not %u\n", index, client.num_tokens,
                     token_id, expected);
      }
      client.prefix.Append(static_cast<int32_t>(expected));
      ++client.num_tokens;
    }
    num_tokens_ += static_cast<int64_t>(token_ids.size());
    ++num_events_;
    last_event_ = now;
    const bool is_first = client.num_tokens == static_cast<int>(token_ids.size());
    if (is_first && Counts(client.began)) {
      ttfts_.push_back(SecondsBetween(client.began, now) * 1e3);
    } else if (!is_first && Counts(client.last)) {
      itls_.push_back(SecondsBetween(client.last, now) * 1e3);
    }
    if (is_first && options_.rounds == 1) CountReady();
    client.last = now;
  }

  // `error` is empty after an answer.
  void OnEnd(int index, const std::string& error) {
    Client& client = clients_[index];
    if (client.rounds == options_.rounds) ++num_done_;
    if (options_.rounds > 1 && client.rounds == 1) CountReady();
    if (client.rounds == options_.rounds && steady_from_.has_value() &&
        !steady_until_.has_value()) {
      steady_until_ = {last_event_, num_tokens_};
    }
    if (error.empty() && client.num_tokens == OutputTokens(index)) {
      ++num_answered_;
      return;
    }
    if (++num_failed_ <= 10) {
      std::fprintf(stderr, "stream %d ended after %d tokens: %s\n", index, client.num_tokens,
                   error.empty() ? "it is not complete" : error.c_str());
    }
  }

  bool all_done() const { return num_done_ == options_.streams; }
  bool all_right() const { return num_wrong_ == 0 && num_failed_ == 0; }
  int64_t num_tokens() const { return num_tokens_; }
  // Requests with a whole answer.
  int64_t num_answered() const { return num_answered_; }

  Figures Measure() {
    const double seconds = SecondsBetween(first_request_, last_event_);
    Figures figures = {
        {"streams", options_.streams},
        {"requests", options_.streams * options_.rounds},
        {"failed", num_failed_},
        {"tokens", num_tokens_},
        {"wrong_tokens", num_wrong_},
        {"tokens_per_event", static_cast<double>(num_tokens_) / std::max<double>(1, num_events_)},
        {"seconds", seconds},
        {"tokens_per_second", static_cast<double>(num_tokens_) / seconds},
        {"ttft_ms_p50", Percentile(ttfts_, 50)},
        {"ttft_ms_p99", Percentile(ttfts_, 99)},
        {"itl_ms_p50", Percentile(itls_, 50)},
        {"itl_ms_p99", Percentile(itls_, 99)}};
    if (steady_from_.has_value() && steady_until_.has_value()) {
      const double steady_seconds = SecondsBetween(steady_from_->time, steady_until_->time);
      const double steps =
          static_cast<double>(steady_until_->num_tokens - steady_from_->num_tokens) /
          options_.streams;
      figures.emplace_back("steady_seconds", steady_seconds);
      figures.emplace_back("steady_tokens_per_second", steps * options_.streams / steady_seconds);
      figures.emplace_back("steps_delivered", steps);
      figures.emplace_back("step_ms", steady_seconds * 1e3 / steps);
      if (options_.ideal_step_ms > 0) {
        figures.emplace_back("share_of_ideal_percent",
                             100 * steps * options_.ideal_step_ms * 1e-3 / steady_seconds);
      }
    }
    return figures;
  }

 private:
  static double SecondsBetween(Clock::time_point begin, Clock::time_point end) {
    return std::chrono::duration<double>(end - begin).count();
  }
  static double Percentile(std::vector<double>& values, double percent) {
    if (values.empty()) return 0;
    const auto rank = static_cast<size_t>(percent / 100 * static_cast<double>(values.size()));
    const auto at = values.begin() + static_cast<std::ptrdiff_t>(std::min(rank, values.size() - 1));
    std::nth_element(values.begin(), at, values.end());
    return *at;
  }

  struct Client {
    SimPrefix prefix;
    int rounds = 0;
    int num_tokens = 0;
    Clock::time_point began, last;
  };
  struct Moment {
    Clock::time_point time;
    int64_t num_tokens = 0;
  };

  // Whether latencies that began then are reported.
  bool Counts(Clock::time_point began) const {
    if (!options_.staggered) return true;
    return steady_from_.has_value() && began >= steady_from_->time && !steady_until_.has_value();
  }

  // A client has come as far as the steady time asks.
  void CountReady() {
    if (++num_ready_ == options_.streams) steady_from_ = {last_event_, num_tokens_};
  }

  const SimClientsOptions options_;
  std::mt19937_64 random_;
  std::vector<Client> clients_;
  int num_done_ = 0;
  int num_ready_ = 0;
  int64_t num_tokens_ = 0;
  int64_t num_answered_ = 0;
  int64_t num_events_ = 0;
  int num_wrong_ = 0;
  int num_failed_ = 0;
  Clock::time_point first_request_, last_event_;
  std::optional<Moment> steady_from_, steady_until_;
  std::vector<double> ttfts_, itls_;
};

}  // namespace fathom
