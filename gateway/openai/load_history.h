// How busy the server was during the last minutes, for the status page: sampled from the
// coordinator's metrics every few seconds. I/O thread only.
#pragma once

#include <chrono>
#include <cstddef>
#include <deque>
#include <initializer_list>
#include <string>
#include <string_view>

#include "gateway/http/io_thread.h"
#include "gateway/http/task.h"
#include "gateway/rpc/coordinator_client.h"

namespace fathom {

class LoadHistory {
 public:
  static constexpr std::chrono::milliseconds kInterval{5'000};
  static constexpr size_t kMaxSamples = 120;  // ten minutes

  struct Sample {
    double prompt_tokens_per_second = 0;
    double generated_tokens_per_second = 0;
    double num_running = 0;
    double num_waiting = 0;
    double kv_cache_usage = 0;  // [0, 1]
  };

  // What the coordinator's metrics say at `now`; "" when it cannot be reached.
  void Add(std::chrono::steady_clock::time_point now, std::string_view metrics_text);

  // Oldest first; at most kMaxSamples.
  const std::deque<Sample>& samples() const { return samples_; }

  // Never ends. `this`, `coordinator` and `io_thread` must outlive it.
  Task<> Watch(CoordinatorClient& coordinator, IoThread& io_thread);

 private:
  std::deque<Sample> samples_;
  // Of the last time the coordinator was reached.
  std::chrono::steady_clock::time_point time_;
  double prompt_tokens_ = -1;  // so far; negative: unknown
  double generated_tokens_ = -1;
};

// The sum of all series of that name in a text of Prometheus' format; each of `labels` must be in
// the series as it is written there: `kind="weights"`. 0 when there is none.
double MetricValue(std::string_view metrics_text, std::string_view name,
                   std::initializer_list<std::string_view> labels = {});

}  // namespace fathom
