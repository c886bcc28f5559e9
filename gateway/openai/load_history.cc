#include "gateway/openai/load_history.h"

#include <algorithm>

#include "absl/status/statusor.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"

namespace fathom {
namespace {

// Tokens a second between two readings of a counter; 0 when it began anew.
double Rate(double before, double after, double seconds) {
  return before < 0 || after < before || seconds <= 0 ? 0 : (after - before) / seconds;
}

}  // namespace

double MetricValue(std::string_view metrics_text, std::string_view name,
                   std::initializer_list<std::string_view> labels) {
  double sum = 0;
  while (!metrics_text.empty()) {
    const size_t end = std::min(metrics_text.find('\n'), metrics_text.size());
    const std::string_view line = metrics_text.substr(0, end);
    metrics_text.remove_prefix(std::min(end + 1, metrics_text.size()));
    if (!line.starts_with(name) || line.size() == name.size()) continue;
    const char next = line[name.size()];
    if (next != '{' && next != ' ') continue;
    const bool has_labels = std::all_of(
        labels.begin(), labels.end(),
        [line](std::string_view label) { return line.find(label) != std::string_view::npos; });
    if (!has_labels) continue;
    // NAME{LABELS} VALUE; labels may hold spaces, the value does not.
    double value = 0;
    if (absl::SimpleAtod(std::string(line.substr(line.rfind(' ') + 1)), &value)) sum += value;
  }
  return sum;
}

void LoadHistory::Add(std::chrono::steady_clock::time_point now, std::string_view metrics_text) {
  Sample sample;
  if (!metrics_text.empty()) {
    const double seconds = std::chrono::duration<double>(now - time_).count();
    const double prompt_tokens = MetricValue(metrics_text, "vllm:prompt_tokens_total");
    const double generated_tokens = MetricValue(metrics_text, "vllm:generation_tokens_total");
    sample.prompt_tokens_per_second = Rate(prompt_tokens_, prompt_tokens, seconds);
    sample.generated_tokens_per_second = Rate(generated_tokens_, generated_tokens, seconds);
    sample.num_running = MetricValue(metrics_text, "vllm:num_requests_running");
    sample.num_waiting = MetricValue(metrics_text, "vllm:num_requests_waiting");
    sample.kv_cache_usage = MetricValue(metrics_text, "vllm:kv_cache_usage_perc");
    prompt_tokens_ = prompt_tokens;
    generated_tokens_ = generated_tokens;
    time_ = now;
  }
  samples_.push_back(sample);
  if (samples_.size() > kMaxSamples) samples_.pop_front();
}

Task<> LoadHistory::Watch(CoordinatorClient& coordinator, IoThread& io_thread) {
  while (true) {
    const absl::StatusOr<std::string> text = co_await coordinator.GetMetrics();
    Add(std::chrono::steady_clock::now(), text.ok() ? std::string_view(*text) : "");
    co_await io_thread.Sleep(kInterval);
  }
}

}  // namespace fathom
