// What the gateway measures, under vLLM's names: latencies and sizes of requests, HTTP counters.
//
// The gauges and counters of the engine are the coordinator's; GET /metrics joins both.
// Thread-safe. Source of names and buckets: vllm/v1/metrics/loggers.py (0.16).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace fathom {

class GatewayMetrics {
 public:
  // `model_name` becomes a label of every vllm: series.
  explicit GatewayMetrics(const std::string& model_name);
  ~GatewayMetrics();
  GatewayMetrics(const GatewayMetrics&) = delete;
  GatewayMetrics& operator=(const GatewayMetrics&) = delete;

  void OnFirstToken(double seconds_since_start);
  void OnNextTokens(double seconds_since_last);

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

  // `pattern`: the route, never the client's path; status 0 counts as 499, the client went away.
  void OnHttpRequest(std::string_view method, std::string_view pattern, int status, double seconds);

  // In the Prometheus text format 0.0.4.
  std::string Text() const;

 private:
  struct Series;
  const std::unique_ptr<Series> series_;
};

}  // namespace fathom
