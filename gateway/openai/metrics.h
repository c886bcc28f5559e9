// What the gateway measures, under vLLM's names: latencies and sizes of requests, HTTP counters.
//
// The gauges and counters of the engine are the coordinator's; GET /metrics joins both.
// Thread-safe, except for what is marked. Source of names and buckets: vllm/v1/metrics/loggers.py
// (0.16).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "gateway/openai/recent_values.h"

namespace fathom {

class GatewayMetrics {
 public:
  // `model_name` becomes a label of every vllm: series.
  explicit GatewayMetrics(const std::string& model_name);
  ~GatewayMetrics();
  GatewayMetrics(const GatewayMetrics&) = delete;
  GatewayMetrics& operator=(const GatewayMetrics&) = delete;

  using TimePoint = RecentValues::TimePoint;
  void OnFirstToken(TimePoint now, double seconds_since_start);  // I/O thread
  void OnNextTokens(TimePoint now, double seconds_since_last);   // I/O thread

  // `reason`: stop, length, abort.
  void OnFinished(std::string_view reason);

  struct RequestDone {
    int64_t prompt_tokens = 0;
    int64_t generation_tokens = 0;
    int64_t max_tokens = 0;
    double seconds = 0;         // from its admission to its last token
    double decode_seconds = 0;  // from its first token to its last
  };
  void OnRequestDone(const RequestDone& request);

  // `n` of a request.
  void OnRequestAdmitted(int n);

  // While one exists a request is being answered by the coordinator.
  class InFlight {
   public:
    explicit InFlight(GatewayMetrics& metrics) : metrics_(metrics) { ++metrics_.num_in_flight_; }
    ~InFlight() { --metrics_.num_in_flight_; }
    InFlight(const InFlight&) = delete;
    InFlight& operator=(const InFlight&) = delete;

   private:
    GatewayMetrics& metrics_;
  };
  int num_in_flight() const { return num_in_flight_; }

  // In seconds. I/O thread.
  const RecentValues& recent_first_tokens() const { return recent_first_tokens_; }
  const RecentValues& recent_inter_tokens() const { return recent_inter_tokens_; }

  // Lines of the access log that could not be written.
  void SetDroppedLogLines(int64_t count);

  // `pattern`: the route, never the client's path; status 0 counts as 499, the client went away.
  void OnHttpRequest(std::string_view method, std::string_view pattern, int status, double seconds);

  // In the Prometheus text format 0.0.4.
  std::string Text() const;

 private:
  struct Series;
  const std::unique_ptr<Series> series_;
  std::atomic<int> num_in_flight_ = 0;
  RecentValues recent_first_tokens_;
  RecentValues recent_inter_tokens_;
};

}  // namespace fathom
