// The coordinator's figures for Prometheus.
//
// Names that vLLM has are vLLM's, with its labels model_name and engine, so that its dashboards
// work; our own begin with `fathom:`. Source: vllm/v1/metrics/loggers.py. Thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "coordinator/group_plan.h"

namespace fathom {

class Metrics {
 public:
  explicit Metrics(const std::string& model_name);  // of the group that is engine 0
  // Of another group; told together with those of `first`, which outlives this.
  Metrics(const Metrics& first, int engine);
  ~Metrics();

  // After each step that was made.
  struct StepFigures {
    int num_tokens = 0;          // computed, recomputed ones included
    int num_prefill_tokens = 0;  // of them, of sequences with more than one to compute
    int num_prompt_tokens = 0;   // computed or found for the first time
    int num_generated_tokens = 0;
    // Since the last step, see Scheduler::PrefixFigures.
    int64_t num_prefix_tokens_queried = 0;
    int64_t num_prefix_tokens_found = 0;
    int num_preemptions = 0;     // since the last step
    double seconds = 0;          // from sending the command to the last answer
    double compute_seconds = 0;  // of it, in rank 0's forward pass and sampler
    double prefill_seconds = 0;  // of that, by which it took longer because of prompts
    double cost_error = 0;       // StepCost::mean_error
  };
  void CountStep(const StepFigures& figures);

  void SetLoad(int num_running, int num_waiting, double kv_cache_usage);
  void SetGroup(uint64_t epoch, const GroupPlan& plan);
  void SetServing(bool serving);

  // A prompt whose first token was generated.
  void CountPrompt(int num_tokens, int num_cached_tokens);

  // A request that ended with a finish reason.
  struct RequestFigures {
    double queue_seconds = 0;    // until it was first scheduled
    double prefill_seconds = 0;  // from then to its first token
    double decode_seconds = 0;   // from then to its last
    int num_prompt_tokens_computed = 0;
  };
  void CountFinishedRequest(const RequestFigures& figures);
  // One whose numbers went wrong.
  void CountFaultyRequest();

  void CountGroupFailure();
  void CountRefusedRequest(const absl::Status& refusal);
  void CountCancelledRequest();
  // That another group, or an earlier one, had begun.
  void CountResumedRequest();
  void CountExpiredRequest();

  // Of all groups, in the Prometheus text format 0.0.4.
  std::string Text() const;

 private:
  struct Families;
  const std::unique_ptr<Families> families_;
};

}  // namespace fathom
