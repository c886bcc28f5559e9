#include "coordinator/request_times.h"

namespace fathom {

void RequestTimes::OnStepSent(const Step& step, absl::Duration now) {
  for (const AdmittedSequence& admitted : step.admitted) {
    const auto found = times_.find(admitted.sequence->id);
    if (found != times_.end() && !found->second.scheduled) found->second.scheduled = now;
  }
}

void RequestTimes::OnCommitted(const std::vector<SequenceUpdate>& updates, absl::Duration now) {
  for (const SequenceUpdate& update : updates) {
    const bool is_first = update.token_id.has_value() && update.num_generated_tokens == 1;
    if (!is_first && !update.end.has_value()) continue;
    const auto found = times_.find(update.id);
    if (found == times_.end()) continue;
    if (is_first) {
      found->second.first_token = now;
      metrics_.CountPrompt(update.num_prompt_tokens, update.num_cached_tokens);
    }
    if (!update.end.has_value()) continue;
    OnEnd(update, found->second, now);
    times_.erase(found);
  }
}

void RequestTimes::OnEnd(const SequenceUpdate& update, const Times& times, absl::Duration now) {
  if (update.end == EndReason::kFault) return metrics_.CountFaultyRequest();
  if (!times.scheduled) return;
  const absl::Duration first_token = times.first_token.value_or(now);
  metrics_.CountFinishedRequest(
      {.queue_seconds = absl::ToDoubleSeconds(*times.scheduled - times.submitted),
       .prefill_seconds = absl::ToDoubleSeconds(first_token - *times.scheduled),
       .decode_seconds = absl::ToDoubleSeconds(now - first_token),
       .num_prompt_tokens_computed = update.num_prompt_tokens - update.num_cached_tokens});
}

}  // namespace fathom
