#include "gateway/openai/metrics.h"

#include <chrono>
#include <vector>

#include "absl/strings/str_cat.h"
#include "prometheus/counter.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"
#include "prometheus/text_serializer.h"

namespace fathom {
namespace {

using Buckets = prometheus::Histogram::BucketBoundaries;

const Buckets kFirstTokenSeconds = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,
                                    0.25,  0.5,   0.75, 1,    2.5,  5,    7.5,  10,
                                    20,    40,    80,   160,  640,  2560};
// These two are vLLM's with finer ones below, where a server of this speed is.
const Buckets kTokenSeconds = {0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.025, 0.05,
                               0.075, 0.1,   0.15,  0.2,   0.3,    0.4,  0.5,   0.75,
                               1,     2.5,   5,     7.5,   10,     20,   40,    80};
const Buckets kRequestSeconds = {0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5,  0.8, 1,
                                 1.5,   2,     2.5,  5,    10,  15,  20,   30,  40,
                                 50,    60,    120,  240,  480, 960, 1920, 7680};
const Buckets kHttpSeconds = {0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60};

// 1, 2, 5, 10, … up to the longest context of the family.
Buckets TokenCounts() {
  Buckets counts;
  for (double decade = 1; decade <= 100'000; decade *= 10) {
    for (const double mantissa : {1, 2, 5}) counts.push_back(decade * mantissa);
  }
  return counts;
}

}  // namespace

struct GatewayMetrics::Series {
  explicit Series(const std::string& model_name)
      : labels{{"model_name", model_name}, {"engine", "0"}} {}

  prometheus::Histogram& AddHistogram(const std::string& name, const std::string& help,
                                      const Buckets& buckets) {
    return prometheus::BuildHistogram().Name(name).Help(help).Register(registry).Add(labels,
                                                                                     buckets);
  }

  prometheus::Registry registry;
  const prometheus::Labels labels;

  prometheus::Histogram& first_token_seconds =
      AddHistogram("vllm:time_to_first_token_seconds",
                   "Histogram of time to first token in seconds.", kFirstTokenSeconds);
  prometheus::Histogram& inter_token_seconds =
      AddHistogram("vllm:inter_token_latency_seconds",
                   "Histogram of inter-token latency in seconds.", kTokenSeconds);
  prometheus::Histogram& output_token_seconds = AddHistogram(
      "vllm:request_time_per_output_token_seconds",
      "Histogram of time per output token in seconds, mean of a request.", kTokenSeconds);
  prometheus::Histogram& request_seconds =
      AddHistogram("vllm:e2e_request_latency_seconds",
                   "Histogram of end to end request latency in seconds.", kRequestSeconds);
  prometheus::Histogram& prompt_tokens = AddHistogram(
      "vllm:request_prompt_tokens", "Number of prefill tokens processed.", TokenCounts());
  prometheus::Histogram& generation_tokens = AddHistogram(
      "vllm:request_generation_tokens", "Number of generation tokens processed.", TokenCounts());
  prometheus::Histogram& max_generation_tokens =
      AddHistogram("vllm:request_max_num_generation_tokens",
                   "Histogram of maximum number of requested generation tokens.", TokenCounts());
  prometheus::Histogram& params_max_tokens = AddHistogram(
      "vllm:request_params_max_tokens", "Histogram of the max_tokens parameter.", TokenCounts());
  prometheus::Histogram& params_n =
      AddHistogram("vllm:request_params_n", "Histogram of the n parameter.", {1, 2, 5, 10, 20});
  prometheus::Family<prometheus::Counter>& successes =
      prometheus::BuildCounter()
          .Name("vllm:request_success_total")
          .Help("Count of successfully processed requests.")
          .Register(registry);
  prometheus::Gauge& dropped_log_lines =
      prometheus::BuildGauge()
          .Name("fathom:access_log_lines_dropped")
          .Help("Lines of --access-log-file that could not be written since the start.")
          .Register(registry)
          .Add({});
  prometheus::Family<prometheus::Counter>& http_requests =
      prometheus::BuildCounter()
          .Name("http_requests_total")
          .Help("Total number of requests by method, status and handler.")
          .Register(registry);
  prometheus::Family<prometheus::Histogram>& http_seconds =
      prometheus::BuildHistogram()
          .Name("http_request_duration_seconds")
          .Help("Latency of requests by handler, in seconds.")
          .Register(registry);
};

GatewayMetrics::GatewayMetrics(const std::string& model_name)
    : series_(std::make_unique<Series>(model_name)) {
  for (const char* reason : {"stop", "length", "abort"}) {  // so that rates start at 0
    prometheus::Labels labels = series_->labels;
    labels["finished_reason"] = reason;
    series_->successes.Add(labels);
  }
}

GatewayMetrics::~GatewayMetrics() = default;

void GatewayMetrics::OnFirstToken(TimePoint now, double seconds_since_start) {
  series_->first_token_seconds.Observe(seconds_since_start);
  recent_first_tokens_.Add(now, seconds_since_start);
}

void GatewayMetrics::OnNextTokens(TimePoint now, double seconds_since_last) {
  series_->inter_token_seconds.Observe(seconds_since_last);
  recent_inter_tokens_.Add(now, seconds_since_last);
}

void GatewayMetrics::OnFinished(std::string_view reason) {
  prometheus::Labels labels = series_->labels;
  labels["finished_reason"] = std::string(reason);
  series_->successes.Add(labels).Increment();
}

void GatewayMetrics::OnRequestDone(const RequestDone& request) {
  series_->prompt_tokens.Observe(static_cast<double>(request.prompt_tokens));
  series_->generation_tokens.Observe(static_cast<double>(request.generation_tokens));
  series_->max_generation_tokens.Observe(static_cast<double>(request.generation_tokens));
  series_->params_max_tokens.Observe(static_cast<double>(request.max_tokens));
  series_->request_seconds.Observe(request.seconds);
  if (request.generation_tokens > 1) {
    series_->output_token_seconds.Observe(request.decode_seconds /
                                          static_cast<double>(request.generation_tokens - 1));
  }
}

void GatewayMetrics::OnRequestAdmitted(int n) { series_->params_n.Observe(n); }

void GatewayMetrics::OnHttpRequest(std::string_view method, std::string_view pattern, int status,
                                   double seconds) {
  const std::string handler(pattern.empty() ? "none" : pattern);
  const std::string status_class = status == 0 ? "499" : absl::StrCat(status / 100, "xx");
  // A client may invent any method; a label must not grow with it.
  const bool known = method == "GET" || method == "POST" || method == "HEAD";
  const std::string method_label(known ? method : "other");
  series_->http_requests
      .Add({{"handler", handler}, {"method", method_label}, {"status", status_class}})
      .Increment();
  series_->http_seconds.Add({{"handler", handler}, {"method", method_label}}, kHttpSeconds)
      .Observe(seconds);
}

void GatewayMetrics::SetDroppedLogLines(int64_t count) {
  series_->dropped_log_lines.Set(static_cast<double>(count));
}

std::string GatewayMetrics::Text() const {
  return prometheus::TextSerializer().Serialize(series_->registry.Collect());
}

}  // namespace fathom
