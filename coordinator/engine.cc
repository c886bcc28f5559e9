#include "coordinator/engine.h"

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "spdlog/spdlog.h"

namespace fathom {
namespace {

v1::FinishReason FinishReasonOf(EndReason end) {
  switch (end) {
    case EndReason::kStop:
    case EndReason::kStopTokenId:
      return v1::FINISH_REASON_STOP;
    case EndReason::kLength:
      return v1::FINISH_REASON_LENGTH;
    case EndReason::kFault:
      return v1::FINISH_REASON_UNSPECIFIED;
  }
  return v1::FINISH_REASON_UNSPECIFIED;
}

// A request is validated for the group that serves when it comes. Another one, formed since, may
// have room for less.
absl::Status CheckFits(const Request& request, const GroupPlan& plan) {
  const int64_t limit =
      std::min<int64_t>(plan.model.max_model_len(), int64_t{plan.num_kv_blocks} * plan.block_size);
  if (request.max_total_tokens() <= limit) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "prompt and max_tokens need ", request.max_total_tokens(),
      " tokens, but the workers were replaced, and those there are now hold only ", limit));
}

// The cause is for the log: it names addresses, and what gRPC says of them.
void EndAll(const std::vector<Inbox::Submission>& unfinished, const std::string& why) {
  const absl::Status end =
      absl::UnavailableError(absl::StrCat("the request was not finished: ", why, "; try again"));
  for (const Inbox::Submission& lost : unfinished) lost.live.stream->OnEnd(end);
  for (const Inbox::Submission& lost : unfinished) lost.live.stream->Flush();
}

}  // namespace

void Engine::EndLost(const std::vector<Inbox::Submission>& unfinished) {
  EndAll(unfinished, "the workers were lost");
}

Engine::Engine(Options options, Inbox& inbox, StatusBoard& board, Metrics& metrics, OnLost on_lost)
    : options_(options),
      inbox_(inbox),
      board_(board),
      metrics_(metrics),
      on_lost_(std::move(on_lost)),
      backoff_(options.min_backoff),
      request_times_(metrics),
      throughput_log_(options.log_interval) {}

Engine::Next Engine::Advance(absl::Duration now) {
  if (group_ == nullptr) return AdvanceWithoutGroup(now);
  const Inbox::Order order = inbox_.order();
  if (order == Inbox::Order::kStop) return End(now);

  // Once it is broken no answer counts any more.
  absl::Status status = is_serving_ ? CommitAnsweredSteps(now) : absl::OkStatus();
  if (status.ok()) status = group_->Check(now);
  if (!status.ok()) return AdvanceWithBrokenGroup(status, now);
  LookForSilence();

  if (IsIdle()) throughput_log_.Wake(now);
  ExpireWaiting(now);
  do {
    Apply(inbox_.Take(), now);
  } while (SendNextStep(now));
  Deliver();
  scheduler_->PublishFullBlocks();  // the workers compute meanwhile
  ReportLoad(now);
  LogThroughput(now);
  if (IsIdle() && order == Inbox::Order::kDrain) return End(now);
  return {.until = std::min(group_->deadline(), now + throughput_log_.DueIn(now))};
}

Engine::Next Engine::AdvanceWithoutGroup(absl::Duration now) {
  if (inbox_.order() != Inbox::Order::kServe) return End(now);
  if (now < form_at_) return {.until = form_at_};
  return {.kind = Next::Kind::kFormGroup};
}

void Engine::TakeGroup(absl::StatusOr<std::unique_ptr<WorkerGroup>> group, absl::Duration now) {
  CHECK(group_ == nullptr);
  if (group.ok()) {
    group_ = *std::move(group);
    BeginServing(now);
    return;
  }
  if (inbox_.order() == Inbox::Order::kServe) {
    spdlog::error("no group could form, trying again: {}", std::string(group.status().message()));
  }
  StopServing(group.status());
  form_at_ = now + backoff_;
  backoff_ = std::min(2 * backoff_, options_.max_backoff);
}

void Engine::BeginServing(absl::Duration now) {
  const GroupPlan& plan = group_->plan();
  last_epoch_ = group_->epoch();
  has_made_steps_ = false;
  last_committed_at_ = now;
  num_preemptions_counted_ = 0;
  prefix_figures_counted_ = {};
  prefill_us_counted_ = 0;
  throughput_log_.Wake(now);
  scheduler_ = std::make_unique<Scheduler>(Scheduler::Options{
      .max_tokens_per_step = plan.max_tokens_per_step,
      .max_sequences = plan.max_sequences,
      .max_prompt_logprob_rows_per_step = options_.max_prompt_logprob_rows_per_step,
      .block_size = plan.block_size,
      .num_kv_blocks = plan.num_kv_blocks,
      .num_kv_domains = 1,
      .target_step_us = absl::ToDoubleMicroseconds(options_.target_itl),
      .policy = options_.policy,
      .share_prefixes = options_.enable_prefix_caching});
  board_.SetGroup(last_epoch_, {.model = plan.model, .kv_cache_tokens = plan.kv_cache_tokens()},
                  plan.block_size, plan.num_kv_blocks);
  metrics_.SetGroup(last_epoch_, plan);
  silent_workers_.clear();
  is_serving_ = true;
  inbox_.Open();
  board_.SetState(v1::ServerInfo::STATE_SERVING, "");
  metrics_.SetServing(true);
  spdlog::info("serving, epoch {}", last_epoch_);
}

void Engine::LookForSilence() {
  const std::string silent = group_->SilentWorkers();
  if (silent == silent_workers_) return;
  silent_workers_ = silent;
  metrics_.SetServing(silent.empty());
  if (silent.empty()) {
    spdlog::info("all workers answer again");
    board_.SetState(v1::ServerInfo::STATE_SERVING, "");
  } else {
    spdlog::warn("no answer from {}", silent);
    board_.SetState(v1::ServerInfo::STATE_STARTING, absl::StrCat("no answer from ", silent));
  }
}

// At once, before anything that takes time: who asks must not be told that steps can be made.
void Engine::StopServing(const absl::Status& cause) {
  is_serving_ = false;
  metrics_.SetServing(false);
  inbox_.Close(
      absl::UnavailableError("no steps can be made until the workers are back; try again"));
  board_.SetState(v1::ServerInfo::STATE_STARTING, std::string(cause.message()));
}

Engine::Next Engine::AdvanceWithBrokenGroup(const absl::Status& failure, absl::Duration now) {
  if (is_serving_) StopServing(failure);
  const std::optional<absl::Status> cause = group_->Cause(now);
  if (!cause.has_value()) return {.until = group_->deadline()};
  LoseGroup(*cause, now);
  return AdvanceWithoutGroup(now);
}

void Engine::LoseGroup(const absl::Status& cause, absl::Duration now) {
  metrics_.CountGroupFailure();
  spdlog::error("the group of epoch {} broke: {}", last_epoch_, std::string(cause.message()));
  on_lost_(TakeUnfinished(now));
  // A group that breaks before its first step must not be formed in a tight loop.
  if (has_made_steps_) backoff_ = options_.min_backoff;
  form_at_ = now + backoff_;
  backoff_ = std::min(2 * backoff_, options_.max_backoff);
  group_.reset();  // the others must leave the epoch before the next one
}

std::vector<Inbox::Submission> Engine::TakeUnfinished(absl::Duration now) {
  Apply(inbox_.Take(), now);
  Deliver();
  std::vector<Inbox::Submission> unfinished;
  for (const Sequence* sequence : scheduler_->Sequences()) {
    Client& client = clients_.at(sequence->id);
    const bool was_computed = sequence->slot >= 0;
    unfinished.push_back(
        {.id = sequence->id,
         .live = {.request = sequence->request,
                  .stream = std::move(client.stream),
                  .progress = sequence->progress(),
                  .num_groups_lost = client.num_groups_lost + (was_computed ? 1 : 0)}});
  }
  clients_.clear();
  begin_by_.clear();
  request_times_.Clear();
  in_flight_.clear();
  scheduler_.reset();
  ReportLoad(now);
  return unfinished;
}

Engine::Next Engine::End(absl::Duration now) {
  if (group_ != nullptr) {
    metrics_.SetServing(false);
    EndAll(TakeUnfinished(now), "the server is stopping");
    group_.reset();
  }
  return {.kind = Next::Kind::kEnd};
}

bool Engine::IsIdle() const {
  return scheduler_->num_running() + scheduler_->num_waiting() == 0 && in_flight_.empty();
}

absl::Status Engine::CommitAnsweredSteps(absl::Duration now) {
  while (!in_flight_.empty()) {
    std::optional<v1::StepResult> result = group_->TakeResult(now);
    if (!result.has_value()) break;
    const StepInFlight made = std::move(in_flight_.front());
    in_flight_.pop_front();
    RETURN_IF_ERROR(Commit(made, *std::move(result), now));
  }
  return absl::OkStatus();
}

absl::Status Engine::Commit(const StepInFlight& made, v1::StepResult result, absl::Duration now) {
  const double compute_seconds = static_cast<double>(result.compute_us()) * 1e-6;
  absl::StatusOr<StepAnswer> answer =
      DecodeResult(made.step, group_->plan().model.vocab_size(), std::move(result));
  if (!answer.ok()) {
    group_->Break(
        absl::InternalError(absl::StrCat(group_->worker_name(0), ": ", answer.status().message())));
    return group_->Check(now);
  }
  has_made_steps_ = true;
  const std::vector<SequenceUpdate> updates = scheduler_->Commit(made.step, answer->outcome);
  for (const SequenceUpdate& update : updates) {
    deliveries_.push_back(MakeDelivery(update, *answer));
  }
  request_times_.OnCommitted(updates, now);
  CountStep(made, updates, compute_seconds, now);
  return absl::OkStatus();
}

void Engine::Apply(Inbox::Content content, absl::Duration now) {
  for (auto& [id, live] : content.submissions) {
    const absl::Status fits = CheckFits(*live.request, group_->plan());
    if (!fits.ok()) {
      live.stream->OnEnd(fits);
      live.stream->Flush();
      continue;
    }
    const int most_milliseconds = live.request->max_queue_milliseconds;
    const bool was_begun = live.progress.num_cached_tokens.has_value();  // elsewhere
    if (most_milliseconds > 0 && !was_begun) {
      begin_by_.emplace(now + absl::Milliseconds(most_milliseconds), id);
    }
    scheduler_->Add(id, std::move(live.request), std::move(live.progress));
    clients_[id] = {.stream = std::move(live.stream), .num_groups_lost = live.num_groups_lost};
    request_times_.OnSubmitted(id, now);
  }
  for (const SequenceId id : content.cancellations) {
    if (!scheduler_->Cancel(id)) continue;
    metrics_.CountCancelledRequest();
    clients_.erase(id);
    request_times_.OnCancelled(id);
    std::erase_if(deliveries_, [id](const Delivery& delivery) { return delivery.id == id; });
  }
}

void Engine::ExpireWaiting(absl::Duration now) {
  while (!begin_by_.empty() && begin_by_.begin()->first <= now) {
    const SequenceId id = begin_by_.begin()->second;
    begin_by_.erase(begin_by_.begin());
    if (!scheduler_->CancelUnlessStarted(id)) continue;
    metrics_.CountExpiredRequest();
    deliveries_.push_back(
        {.id = id,
         .stream = std::move(clients_.at(id).stream),
         .response = {},
         .end = absl::DeadlineExceededError("the request was not begun within its max_queue_ms")});
    clients_.erase(id);
    request_times_.OnCancelled(id);
  }
}

bool Engine::SendNextStep(absl::Duration now) {
  if (std::ssize(in_flight_) >= options_.max_steps_in_flight) return false;
  Step step = scheduler_->Schedule();
  if (step.empty()) return false;
  group_->Send(EncodeStep(step, group_->epoch()), now);
  request_times_.OnStepSent(step, now);
  in_flight_.push_back({.step = std::move(step), .sent_at = now});
  return true;
}

Engine::Delivery Engine::MakeDelivery(const SequenceUpdate& update, StepAnswer& answer) {
  const auto client = clients_.find(update.id);
  CHECK(client != clients_.end());
  Delivery delivery{.id = update.id, .stream = client->second.stream, .response = {}, .end = {}};
  v1::GenerateResponse& response = delivery.response;
  if (!answer.prompt_logprobs.empty()) {
    *response.mutable_prompt_logprobs() =
        std::move(*answer.prompt_logprobs[update.batch_index].mutable_logprobs());
  }
  if (update.token_id.has_value()) {
    response.add_token_ids(*update.token_id);
    if (!answer.logprobs.empty()) {
      *response.mutable_logprobs() =
          std::move(*answer.logprobs[update.batch_index].mutable_logprobs());
    }
  }
  if (update.token_id.has_value() && update.num_generated_tokens == 1) {
    response.mutable_usage()->set_cached_tokens(update.num_cached_tokens);
  }
  if (!update.end.has_value()) return delivery;

  clients_.erase(client);
  if (*update.end == EndReason::kFault) {
    delivery.end = *answer.outcome.sequences[update.batch_index].fault;
    return delivery;
  }
  response.set_finish_reason(FinishReasonOf(*update.end));
  if (*update.end == EndReason::kStopTokenId) response.set_stop_token_id(*update.token_id);
  response.mutable_usage()->set_prompt_tokens(update.num_prompt_tokens);
  response.mutable_usage()->set_completion_tokens(update.num_generated_tokens);
  response.mutable_usage()->set_cached_tokens(update.num_cached_tokens);
  delivery.end = absl::OkStatus();
  return delivery;
}

void Engine::Deliver() {
  for (Delivery& delivery : deliveries_) {
    const v1::GenerateResponse& response = delivery.response;
    if (response.token_ids_size() + response.prompt_logprobs_size() > 0 || response.has_usage()) {
      delivery.stream->OnTokens(std::move(delivery.response));
    }
    if (delivery.end.has_value()) delivery.stream->OnEnd(*delivery.end);
  }
  // Not before all is said: streams of one connection share a message.
  for (const Delivery& delivery : deliveries_) delivery.stream->Flush();
  deliveries_.clear();
}

void Engine::CountStep(const StepInFlight& made, const std::vector<SequenceUpdate>& updates,
                       double compute_seconds, absl::Duration now) {
  Metrics::StepFigures figures;
  for (const SequenceUpdate& update : updates) {
    figures.num_prompt_tokens += update.num_prompt_tokens_done;
    if (update.token_id.has_value()) ++figures.num_generated_tokens;
  }
  const int64_t num_preemptions = scheduler_->num_preemptions();
  figures.num_preemptions = static_cast<int>(num_preemptions - num_preemptions_counted_);
  num_preemptions_counted_ = num_preemptions;
  const Scheduler::PrefixFigures prefixes = scheduler_->prefix_figures();
  figures.num_prefix_tokens_queried = prefixes.num_queried - prefix_figures_counted_.num_queried;
  figures.num_prefix_tokens_found = prefixes.num_found - prefix_figures_counted_.num_found;
  prefix_figures_counted_ = prefixes;
  figures.num_tokens = made.step.num_tokens;
  figures.num_prefill_tokens = made.step.num_prefill_tokens;
  // The workers begin a step when they have ended the one before.
  figures.seconds = absl::ToDoubleSeconds(now - std::max(made.sent_at, last_committed_at_));
  last_committed_at_ = now;
  figures.compute_seconds = compute_seconds;
  const double prefill_us = scheduler_->prefill_us();
  figures.prefill_seconds = 1e-6 * (prefill_us - prefill_us_counted_);
  prefill_us_counted_ = prefill_us;
  figures.cost_error = scheduler_->step_cost().mean_error();
  metrics_.CountStep(figures);
  board_.CountStep();
  throughput_log_.Add(figures.num_prompt_tokens, figures.num_generated_tokens);
}

void Engine::LogThroughput(absl::Duration now) {
  if (throughput_log_.DueIn(now) > absl::ZeroDuration()) return;
  if (const auto line = throughput_log_.Line(now, LoadNow())) spdlog::info("{}", *line);
}

ThroughputLog::Load Engine::LoadNow() const {
  if (scheduler_ == nullptr) return {};
  const double num_blocks = scheduler_->num_blocks();
  return {.num_running = scheduler_->num_running(),
          .num_waiting = scheduler_->num_waiting(),
          .kv_cache_usage = 1 - scheduler_->num_free_blocks() / num_blocks};
}

void Engine::ReportLoad(absl::Duration now) {
  const ThroughputLog::Load load = LoadNow();
  metrics_.SetLoad(load.num_running, load.num_waiting, load.kv_cache_usage);
  board_.SetLoad({.num_running = load.num_running,
                  .num_waiting = load.num_waiting,
                  .num_free_kv_blocks = scheduler_ == nullptr ? 0 : scheduler_->num_free_blocks()});
  if (scheduler_ != nullptr) {
    queue_rate_.Note(now, scheduler_->num_started_tokens(), load.num_waiting > 0);
  }
  inbox_.SetLoad({.num_requests = load.num_waiting,
                  .num_tokens = scheduler_ == nullptr ? 0 : scheduler_->num_waiting_tokens(),
                  .tokens_per_second = queue_rate_.tokens_per_second()});
}

}  // namespace fathom
