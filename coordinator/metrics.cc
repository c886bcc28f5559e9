#include "coordinator/metrics.h"

#include <map>
#include <utility>

#include "prometheus/counter.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"
#include "prometheus/text_serializer.h"

namespace fathom {
namespace {

using Labels = std::map<std::string, std::string>;

}  // namespace

struct Metrics::Families {
  Families(const std::string& model_name, int engine,
           std::shared_ptr<prometheus::Registry> shared_registry)
      : labels{{"model_name", model_name}, {"engine", std::to_string(engine)}},
        registry(std::move(shared_registry)) {}

  prometheus::Counter& Counter(const std::string& name, const std::string& help,
                               const Labels& extra = {}) {
    return prometheus::BuildCounter().Name(name).Help(help).Register(*registry).Add(With(extra));
  }
  prometheus::Gauge& Gauge(const std::string& name, const std::string& help,
                           const Labels& extra = {}) {
    return prometheus::BuildGauge().Name(name).Help(help).Register(*registry).Add(With(extra));
  }
  prometheus::Histogram& Histogram(const std::string& name, const std::string& help,
                                   const prometheus::Histogram::BucketBoundaries& buckets) {
    return prometheus::BuildHistogram().Name(name).Help(help).Register(*registry).Add(labels,
                                                                                      buckets);
  }
  // A family is one for all groups, so their labels are each figure's own.
  Labels With(Labels extra) const {
    extra.insert(labels.begin(), labels.end());
    return extra;
  }
  prometheus::Counter& Refused(const std::string& reason) {
    return Counter("fathom:requests_refused_total", "Requests refused before they were queued.",
                   {{"reason", reason}});
  }

  const Labels labels;
  const std::shared_ptr<prometheus::Registry> registry;

  prometheus::Gauge& running =
      Gauge("vllm:num_requests_running", "Number of requests in model execution batches.");
  prometheus::Gauge& waiting =
      Gauge("vllm:num_requests_waiting", "Number of requests waiting to be processed.");
  prometheus::Gauge& kv_cache_usage =
      Gauge("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.");
  prometheus::Counter& preemptions =
      Counter("vllm:num_preemptions_total", "Cumulative number of preemptions.");
  prometheus::Counter& prompt_tokens =
      Counter("vllm:prompt_tokens_total", "Number of prefill tokens processed.");
  prometheus::Counter& generation_tokens =
      Counter("vllm:generation_tokens_total", "Number of generation tokens processed.");
  prometheus::Counter& prefix_cache_queries =
      Counter("vllm:prefix_cache_queries_total",
              "Prefix cache queries, in terms of number of queried tokens.");
  prometheus::Counter& prefix_cache_hits = Counter(
      "vllm:prefix_cache_hits_total", "Prefix cache hits, in terms of number of cached tokens.");
  prometheus::Histogram& iteration_tokens =
      Histogram("vllm:iteration_tokens_total", "Histogram of number of tokens per engine step.",
                {1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384});

  prometheus::Gauge& serving = Gauge("fathom:serving", "1 while the worker group can make steps.");
  prometheus::Gauge& epoch = Gauge("fathom:epoch", "Incarnation of the worker group.");
  prometheus::Gauge& block_size = Gauge("fathom:kv_block_tokens", "Tokens per KV block.");
  prometheus::Gauge& kv_blocks = Gauge("fathom:kv_blocks", "KV blocks of the group.");
  prometheus::Counter& steps = Counter("fathom:steps_total", "Steps made.");
  prometheus::Histogram& step_seconds =
      Histogram("fathom:step_seconds",
                "Time until all workers have answered a step, from sending it or, if it was sent "
                "ahead, from the answer before.",
                {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30});
  prometheus::Counter& compute_seconds = Counter(
      "fathom:compute_seconds_total", "Time of rank 0 in the forward pass and the sampler.");
  prometheus::Gauge& cost_error =
      Gauge("fathom:step_cost_error", "Mean error of foretold step times, as a share of them.");
  prometheus::Counter& group_failures =
      Counter("fathom:group_failures_total", "Times the worker group was dissolved by a fault.");
  prometheus::Counter& cancelled =
      Counter("fathom:requests_cancelled_total", "Requests that their client cancelled.");
  prometheus::Counter& resumed =
      Counter("fathom:requests_resumed_total",
              "Requests that lost their worker group and went on with this one.");
  prometheus::Counter& expired = Counter("fathom:requests_expired_total",
                                         "Requests that were not begun within their max_queue_ms.");
  prometheus::Counter& refused_invalid = Refused("invalid");
  prometheus::Counter& refused_queue_full = Refused("queue_full");
  prometheus::Counter& refused_unavailable = Refused("unavailable");
};

Metrics::Metrics(const std::string& model_name)
    : families_(std::make_unique<Families>(
          model_name, 0,
          std::make_shared<prometheus::Registry>(prometheus::Registry::InsertBehavior::Merge))) {}

Metrics::Metrics(const Metrics& first, int engine)
    : families_(std::make_unique<Families>(first.families_->labels.at("model_name"), engine,
                                           first.families_->registry)) {}

Metrics::~Metrics() = default;

void Metrics::CountStep(const StepFigures& figures) {
  families_->steps.Increment();
  families_->iteration_tokens.Observe(figures.num_tokens);
  families_->prompt_tokens.Increment(figures.num_prompt_tokens);
  families_->generation_tokens.Increment(figures.num_generated_tokens);
  families_->preemptions.Increment(figures.num_preemptions);
  families_->prefix_cache_queries.Increment(static_cast<double>(figures.num_prefix_tokens_queried));
  families_->prefix_cache_hits.Increment(static_cast<double>(figures.num_prefix_tokens_found));
  families_->step_seconds.Observe(figures.seconds);
  families_->compute_seconds.Increment(figures.compute_seconds);
  families_->cost_error.Set(figures.cost_error);
}

void Metrics::SetLoad(int num_running, int num_waiting, double kv_cache_usage) {
  families_->running.Set(num_running);
  families_->waiting.Set(num_waiting);
  families_->kv_cache_usage.Set(kv_cache_usage);
}

void Metrics::SetGroup(uint64_t epoch, int block_size, int num_kv_blocks) {
  families_->epoch.Set(static_cast<double>(epoch));
  families_->block_size.Set(block_size);
  families_->kv_blocks.Set(num_kv_blocks);
}

void Metrics::SetServing(bool serving) { families_->serving.Set(serving ? 1 : 0); }

void Metrics::CountGroupFailure() { families_->group_failures.Increment(); }

void Metrics::CountRefusedRequest(Refusal refusal) {
  switch (refusal) {
    case Refusal::kInvalid:
      return families_->refused_invalid.Increment();
    case Refusal::kQueueFull:
      return families_->refused_queue_full.Increment();
    case Refusal::kUnavailable:
      return families_->refused_unavailable.Increment();
  }
}

void Metrics::CountExpiredRequest() { families_->expired.Increment(); }

void Metrics::CountCancelledRequest() { families_->cancelled.Increment(); }

void Metrics::CountResumedRequest() { families_->resumed.Increment(); }

std::string Metrics::Text() const {
  return prometheus::TextSerializer().Serialize(families_->registry->Collect());
}

}  // namespace fathom
