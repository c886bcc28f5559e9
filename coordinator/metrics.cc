#include "coordinator/metrics.h"

#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
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

  // vLLM's bounds, and finer ones below 0.3 s, where a server of this speed is.
  prometheus::Histogram& RequestSeconds(const std::string& name, const std::string& help) {
    return Histogram(name, help,
                     {0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1,   1.5, 2,   2.5,  5,
                      10,    15,    20,   30,   40,  50,  60,  120, 240, 480, 960, 1920, 7680});
  }
  prometheus::Counter& StepTokens(const std::string& kind) {
    return Counter("fathom:step_tokens_total", "Tokens that steps computed, recomputed ones too.",
                   {{"kind", kind}});
  }
  prometheus::Counter& PromptTokens(const std::string& source) {
    return Counter("vllm:prompt_tokens_by_source_total", "Number of prompt tokens by source.",
                   {{"source", source}});
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

  prometheus::Counter& prompt_tokens_cached = Counter(
      "vllm:prompt_tokens_cached_total", "Number of prompt tokens found in the prefix cache.");
  prometheus::Counter& prompt_tokens_computed = PromptTokens("local_compute");
  prometheus::Counter& prompt_tokens_hit = PromptTokens("local_cache_hit");
  prometheus::Counter& corrupted_requests = Counter(
      "vllm:corrupted_requests_total", "Corrupted requests, in terms of requests with NaNs.");
  prometheus::Histogram& queue_seconds = RequestSeconds(
      "vllm:request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.");
  prometheus::Histogram& inference_seconds =
      RequestSeconds("vllm:request_inference_time_seconds",
                     "Histogram of time spent in RUNNING phase for request.");
  prometheus::Histogram& prefill_seconds = RequestSeconds(
      "vllm:request_prefill_time_seconds", "Histogram of time spent in PREFILL phase for request.");
  prometheus::Histogram& decode_seconds = RequestSeconds(
      "vllm:request_decode_time_seconds", "Histogram of time spent in DECODE phase for request.");
  prometheus::Histogram& prefill_computed_tokens = Histogram(
      "vllm:request_prefill_kv_computed_tokens",
      "Histogram of new KV tokens computed during prefill (excluding cached tokens).",
      {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000});

  // Of the group; made anew with it.
  prometheus::Family<prometheus::Gauge>& cache_config =
      prometheus::BuildGauge()
          .Name("vllm:cache_config_info")
          .Help("Information of the LLMEngine CacheConfig")
          .Register(*registry);
  prometheus::Gauge* cache_config_now = nullptr;
  prometheus::Family<prometheus::Gauge>& worker_memory =
      prometheus::BuildGauge()
          .Name("fathom:worker_memory_bytes")
          .Help("What a worker has planned its memory for.")
          .Register(*registry);

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
  prometheus::Counter& prefill_compute_seconds =
      Counter("fathom:prefill_seconds_total",
              "Of fathom:compute_seconds_total, by how much steps took longer because of prompts: "
              "foretold, not measured.");
  prometheus::Counter& prefill_tokens = StepTokens("prefill");
  prometheus::Counter& decode_tokens = StepTokens("decode");
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
  families_->prefill_compute_seconds.Increment(figures.prefill_seconds);
  families_->prefill_tokens.Increment(figures.num_prefill_tokens);
  families_->decode_tokens.Increment(figures.num_tokens - figures.num_prefill_tokens);
  families_->cost_error.Set(figures.cost_error);
}

void Metrics::SetLoad(int num_running, int num_waiting, double kv_cache_usage) {
  families_->running.Set(num_running);
  families_->waiting.Set(num_waiting);
  families_->kv_cache_usage.Set(kv_cache_usage);
}

void Metrics::SetGroup(uint64_t epoch, const GroupPlan& plan) {
  families_->epoch.Set(static_cast<double>(epoch));
  families_->block_size.Set(plan.block_size);
  families_->kv_blocks.Set(plan.num_kv_blocks);
  if (families_->cache_config_now != nullptr) {
    families_->cache_config.Remove(families_->cache_config_now);
  }
  families_->cache_config_now = &families_->cache_config.Add(
      families_->With({{"block_size", absl::StrCat(plan.block_size)},
                       {"cache_dtype", plan.model.kv_cache_dtype()},
                       {"num_gpu_blocks", absl::StrCat(plan.num_kv_blocks)}}));
  families_->cache_config_now->Set(1);
  for (size_t rank = 0; rank < plan.memory.size(); ++rank) {
    const v1::MemoryPlan& memory = plan.memory[rank];
    const auto set = [&](const std::string& kind, uint64_t bytes) {
      families_->worker_memory
          .Add(families_->With({{"kind", kind}, {"worker", absl::StrCat(rank)}}))
          .Set(static_cast<double>(bytes));
    };
    set("budget", memory.budget_bytes());
    set("weights", memory.weight_bytes());
    set("activations", memory.activation_bytes());
    set("kv_cache", memory.kv_block_bytes() * static_cast<uint64_t>(plan.num_kv_blocks));
  }
}

void Metrics::SetServing(bool serving) { families_->serving.Set(serving ? 1 : 0); }

void Metrics::CountPrompt(int num_tokens, int num_cached_tokens) {
  families_->prompt_tokens_cached.Increment(num_cached_tokens);
  families_->prompt_tokens_hit.Increment(num_cached_tokens);
  families_->prompt_tokens_computed.Increment(num_tokens - num_cached_tokens);
}

void Metrics::CountFinishedRequest(const RequestFigures& figures) {
  families_->queue_seconds.Observe(figures.queue_seconds);
  families_->prefill_seconds.Observe(figures.prefill_seconds);
  families_->decode_seconds.Observe(figures.decode_seconds);
  families_->inference_seconds.Observe(figures.prefill_seconds + figures.decode_seconds);
  families_->prefill_computed_tokens.Observe(figures.num_prompt_tokens_computed);
}

void Metrics::CountFaultyRequest() { families_->corrupted_requests.Increment(); }

void Metrics::CountGroupFailure() { families_->group_failures.Increment(); }

void Metrics::CountRefusedRequest(const absl::Status& refusal) {
  if (absl::IsUnavailable(refusal)) return families_->refused_unavailable.Increment();
  if (absl::IsResourceExhausted(refusal)) return families_->refused_queue_full.Increment();
  families_->refused_invalid.Increment();
}

void Metrics::CountExpiredRequest() { families_->expired.Increment(); }

void Metrics::CountCancelledRequest() { families_->cancelled.Increment(); }

void Metrics::CountResumedRequest() { families_->resumed.Increment(); }

std::string Metrics::Text() const {
  return prometheus::TextSerializer().Serialize(families_->registry->Collect());
}

}  // namespace fathom
