#include "coordinator/step_loop.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "spdlog/spdlog.h"

namespace fathom {
namespace {

absl::Duration MonotonicNow() {
  return absl::FromChrono(std::chrono::steady_clock::now().time_since_epoch());
}

v1::FinishReason FinishReasonOf(EndReason end) {
  switch (end) {
    case EndReason::kStop:
      return v1::FINISH_REASON_STOP;
    case EndReason::kLength:
      return v1::FINISH_REASON_LENGTH;
    case EndReason::kFault:
      return v1::FINISH_REASON_UNSPECIFIED;
  }
  return v1::FINISH_REASON_UNSPECIFIED;
}

}  // namespace

StepLoop::StepLoop(Options options, StatusBoard& board, Metrics& metrics)
    : options_(std::move(options)),
      board_(board),
      metrics_(metrics),
      refusal_(absl::UnavailableError("the server is starting")),
      throughput_log_(options_.log_interval) {}

StepLoop::~StepLoop() {
  Stop();
  Join();
}

void StepLoop::Start() {
  thread_ = std::jthread([this] { Run(); });
}

absl::StatusOr<SequenceId> StepLoop::Submit(std::shared_ptr<const Request> request,
                                            std::shared_ptr<TokenStream> stream) {
  const std::lock_guard lock(mutex_);
  if (!refusal_.ok()) return refusal_;
  const int num_waiting = num_waiting_in_scheduler_ + static_cast<int>(inbox_.submissions.size());
  if (num_waiting >= options_.max_queued_requests) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the queue is full: ", num_waiting,
                     " requests are waiting (--max-queued-requests); try again later"));
  }
  inbox_.submissions.push_back(
      {.id = ++last_id_, .request = std::move(request), .stream = std::move(stream)});
  changed_.notify_all();
  return last_id_;
}

void StepLoop::Cancel(SequenceId id) {
  const std::lock_guard lock(mutex_);
  inbox_.cancellations.push_back(id);
  changed_.notify_all();
}

void StepLoop::Drain() {
  bool has_group;
  {
    const std::lock_guard lock(mutex_);
    if (is_draining_) return;
    is_draining_ = true;
    has_group = is_serving_;
    refusal_ = absl::UnavailableError("the server is draining: it is about to stop");
    board_.SetState(v1::ServerInfo::STATE_DRAINING, "running requests finish, new are refused");
    changed_.notify_all();
  }
  if (!has_group) Stop();  // nothing runs, and a group may never form
}

void StepLoop::Stop() {
  {
    const std::lock_guard lock(mutex_);
    is_draining_ = true;
    refusal_ = absl::UnavailableError("the server is stopping");
    board_.SetState(v1::ServerInfo::STATE_DRAINING, "stopping");
    changed_.notify_all();
  }
  stop_.request_stop();  // not under the lock: it breaks the group, which reports to this
}

void StepLoop::Join() {
  if (thread_.joinable()) thread_.join();
}

void StepLoop::Run() {
  absl::Duration backoff = options_.min_backoff;
  while (!MustEnd()) {
    absl::StatusOr<std::unique_ptr<WorkerGroup>> group = FormGroup();
    if (!group.ok()) {
      StopServing(group.status());
    } else {
      BeginServing(**group);
      absl::Status cause = Serve(**group);
      if (cause.ok()) break;  // drained
      StopServing(cause);
      cause = (*group)->Cause();
      EndAllRequests(cause);
      if (!stop_.stop_requested()) {
        metrics_.CountGroupFailure();
        spdlog::error("the group of epoch {} broke: {}", last_epoch_, std::string(cause.message()));
      }
      if (has_made_steps_) backoff = options_.min_backoff;
      group->reset();  // the others must leave the epoch before the next one
    }
    // A group that breaks before its first step must not be formed in a tight loop.
    WaitBeforeFormingAgain(backoff);
    backoff = std::min(2 * backoff, options_.max_backoff);
  }
  EndAllRequests(absl::UnavailableError("the server is stopping"));
}

absl::StatusOr<std::unique_ptr<WorkerGroup>> StepLoop::FormGroup() {
  {
    const std::lock_guard lock(mutex_);
    is_group_broken_ = false;
  }
  spdlog::info("forming a group of {} workers", options_.group.addresses.size());
  const auto report_progress = [this](const std::string& line) {
    spdlog::info("{}", line);
    const std::lock_guard lock(mutex_);
    if (!is_draining_) board_.SetState(v1::ServerInfo::STATE_STARTING, line);
  };
  const auto on_broken = [this] {
    const std::lock_guard lock(mutex_);
    is_group_broken_ = true;
    changed_.notify_all();
  };
  absl::StatusOr<std::unique_ptr<WorkerGroup>> group =
      WorkerGroup::Form(options_.group, last_epoch_, stop_.get_token(), report_progress, on_broken);
  if (group.ok()) last_epoch_ = (*group)->epoch();
  if (!group.ok() && !stop_.stop_requested()) {
    spdlog::error("no group could form, trying again: {}", std::string(group.status().message()));
  }
  return group;
}

void StepLoop::WaitBeforeFormingAgain(absl::Duration backoff) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, absl::ToChronoMilliseconds(backoff), [this] { return is_draining_; });
}

bool StepLoop::MustEnd() {
  const std::lock_guard lock(mutex_);
  return is_draining_ && !is_serving_;
}

void StepLoop::BeginServing(const WorkerGroup& group) {
  const GroupPlan& plan = group.plan();
  vocab_size_ = plan.model.vocab_size();
  has_made_steps_ = false;
  num_preemptions_counted_ = 0;
  prefix_figures_counted_ = {};
  scheduler_ = std::make_unique<Scheduler>(Scheduler::Options{
      .max_tokens_per_step = options_.group.max_tokens_per_step,
      .max_sequences = options_.group.max_sequences,
      .max_prompt_logprob_rows_per_step = options_.max_prompt_logprob_rows_per_step,
      .block_size = plan.block_size,
      .num_kv_blocks = plan.num_kv_blocks,
      .num_kv_domains = 1,
      .target_step_us = absl::ToDoubleMicroseconds(options_.target_itl),
      .share_prefixes = options_.enable_prefix_caching});
  board_.SetGroup(group.epoch(), {.model = plan.model, .kv_cache_tokens = plan.kv_cache_tokens()},
                  plan.block_size, plan.num_kv_blocks);
  metrics_.SetGroup(group.epoch(), plan.block_size, plan.num_kv_blocks);
  const std::lock_guard lock(mutex_);
  if (is_draining_) return;
  is_serving_ = true;
  refusal_ = absl::OkStatus();
  board_.SetState(v1::ServerInfo::STATE_SERVING, "");
  metrics_.SetServing(true);
  spdlog::info("serving, epoch {}", group.epoch());
}

// At once, before anything that takes time: who asks must not be told that steps can be made.
void StepLoop::StopServing(const absl::Status& cause) {
  metrics_.SetServing(false);
  const std::lock_guard lock(mutex_);
  is_serving_ = false;
  if (is_draining_) return;
  refusal_ = absl::UnavailableError(
      absl::StrCat("no steps can be made until the workers are back: ", cause.message()));
  board_.SetState(v1::ServerInfo::STATE_STARTING, std::string(cause.message()));
}

void StepLoop::EndAllRequests(const absl::Status& cause) {
  Deliver();
  Inbox inbox;
  {
    const std::lock_guard lock(mutex_);
    inbox = std::exchange(inbox_, {});
  }
  const absl::Status end =
      absl::UnavailableError(absl::StrCat("the request was not finished: ", cause.message()));
  const auto streams = std::exchange(streams_, {});
  for (const auto& [id, stream] : streams) stream->OnEnd(end);
  for (const Submission& submission : inbox.submissions) submission.stream->OnEnd(end);
  for (const auto& [id, stream] : streams) stream->Flush();
  for (const Submission& submission : inbox.submissions) submission.stream->Flush();
  in_flight_.clear();
  scheduler_.reset();
  ReportLoad();
}

absl::Status StepLoop::Serve(WorkerGroup& group) {
  while (true) {
    RETURN_IF_ERROR(group.status());
    Apply(TakeInbox());
    if (IsIdle() && IsDrained()) return absl::OkStatus();
    const bool may_send_more = SendNextStep(group);
    Deliver();
    ReportLoad();
    if (!may_send_more && !in_flight_.empty()) RETURN_IF_ERROR(CommitOldestStep(group));
  }
}

bool StepLoop::IsDrained() {
  const std::lock_guard lock(mutex_);
  return is_draining_ && inbox_.empty();
}

bool StepLoop::IsIdle() const {
  return scheduler_->num_running() + scheduler_->num_waiting() == 0 && in_flight_.empty() &&
         deliveries_.empty();
}

StepLoop::Inbox StepLoop::TakeInbox() {
  std::unique_lock lock(mutex_);
  if (IsIdle()) {
    const auto has_reason = [this] { return !inbox_.empty() || is_draining_ || is_group_broken_; };
    // The last line of a burst is due while nothing happens any more.
    const absl::Duration due = throughput_log_.DueIn(MonotonicNow());
    if (due != absl::InfiniteDuration() &&
        !changed_.wait_for(lock, absl::ToChronoMilliseconds(due), has_reason)) {
      LogThroughput();
    }
    changed_.wait(lock, has_reason);
    throughput_log_.Wake(MonotonicNow());
  }
  return std::exchange(inbox_, {});
}

void StepLoop::Apply(Inbox inbox) {
  for (Submission& submission : inbox.submissions) {
    scheduler_->Add(submission.id, std::move(submission.request));
    streams_[submission.id] = std::move(submission.stream);
  }
  for (const SequenceId id : inbox.cancellations) {
    if (!scheduler_->Cancel(id)) continue;
    metrics_.CountCancelledRequest();
    streams_.erase(id);
    std::erase_if(deliveries_, [id](const Delivery& delivery) { return delivery.id == id; });
  }
}

bool StepLoop::SendNextStep(WorkerGroup& group) {
  Step step = scheduler_->Schedule();
  if (step.empty()) return false;
  group.Send(EncodeStep(step, group.epoch()));
  in_flight_.push_back({.step = std::move(step), .sent_at = MonotonicNow()});
  return static_cast<int>(in_flight_.size()) < options_.max_steps_in_flight;
}

absl::Status StepLoop::CommitOldestStep(WorkerGroup& group) {
  ASSIGN_OR_RETURN(v1::StepResult result, group.Await(in_flight_.front().step.number));
  const StepInFlight made = std::move(in_flight_.front());
  in_flight_.pop_front();
  const double compute_seconds = static_cast<double>(result.compute_us()) * 1e-6;
  absl::StatusOr<StepAnswer> answer = DecodeResult(made.step, vocab_size_, std::move(result));
  if (!answer.ok()) {
    group.Break(absl::InternalError(
        absl::StrCat(WorkerName(0, options_.group.addresses[0]), ": ", answer.status().message())));
    return group.status();
  }
  has_made_steps_ = true;
  const std::vector<SequenceUpdate> updates = scheduler_->Commit(answer->outcome);
  for (const SequenceUpdate& update : updates) {
    deliveries_.push_back(MakeDelivery(update, *answer));
  }
  CountStep(made, updates, compute_seconds);
  return absl::OkStatus();
}

StepLoop::Delivery StepLoop::MakeDelivery(const SequenceUpdate& update, StepAnswer& answer) {
  const auto stream = streams_.find(update.id);
  CHECK(stream != streams_.end());
  Delivery delivery{.id = update.id, .stream = stream->second, .response = {}, .end = {}};
  v1::GenerateResponse& response = delivery.response;
  if (!answer.prompt_logprobs.empty()) {
    *response.mutable_prompt_logprobs() =
        std::move(*answer.prompt_logprobs[update.batch_index].mutable_logprobs());
  }
  if (!update.token_ids.empty()) {
    response.mutable_token_ids()->Add(update.token_ids.begin(), update.token_ids.end());
    if (!answer.logprobs.empty()) {
      *response.mutable_logprobs() =
          std::move(*answer.logprobs[update.batch_index].mutable_logprobs());
    }
  }
  if (!update.token_ids.empty() && update.num_generated_tokens == 1) {
    response.mutable_usage()->set_cached_tokens(update.num_cached_tokens);
  }
  if (!update.end.has_value()) return delivery;

  streams_.erase(stream);
  if (*update.end == EndReason::kFault) {
    delivery.end = absl::InternalError(update.fault);
    return delivery;
  }
  response.set_finish_reason(FinishReasonOf(*update.end));
  if (update.stop_token_id.has_value()) response.set_stop_token_id(*update.stop_token_id);
  response.mutable_usage()->set_prompt_tokens(update.num_prompt_tokens);
  response.mutable_usage()->set_completion_tokens(update.num_generated_tokens);
  response.mutable_usage()->set_cached_tokens(update.num_cached_tokens);
  delivery.end = absl::OkStatus();
  return delivery;
}

void StepLoop::Deliver() {
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

void StepLoop::CountStep(const StepInFlight& made, const std::vector<SequenceUpdate>& updates,
                         double compute_seconds) {
  Metrics::StepFigures figures;
  for (const SequenceUpdate& update : updates) {
    figures.num_prompt_tokens += update.num_prompt_tokens_done;
    figures.num_generated_tokens += static_cast<int>(update.token_ids.size());
  }
  const int64_t num_preemptions = scheduler_->num_preemptions();
  figures.num_preemptions = static_cast<int>(num_preemptions - num_preemptions_counted_);
  num_preemptions_counted_ = num_preemptions;
  const Scheduler::PrefixFigures prefixes = scheduler_->prefix_figures();
  figures.num_prefix_tokens_queried = prefixes.num_queried - prefix_figures_counted_.num_queried;
  figures.num_prefix_tokens_found = prefixes.num_found - prefix_figures_counted_.num_found;
  prefix_figures_counted_ = prefixes;
  figures.num_tokens = made.step.num_tokens;
  // The workers begin a step when they have ended the one before.
  const absl::Duration now = MonotonicNow();
  figures.seconds = absl::ToDoubleSeconds(now - std::max(made.sent_at, last_committed_at_));
  last_committed_at_ = now;
  figures.compute_seconds = compute_seconds;
  figures.cost_error = scheduler_->step_cost().mean_error();
  metrics_.CountStep(figures);
  board_.CountStep();
  throughput_log_.Add(figures.num_prompt_tokens, figures.num_generated_tokens);
  LogThroughput();
}

void StepLoop::LogThroughput() {
  if (const auto line = throughput_log_.Line(MonotonicNow(), LoadNow())) {
    spdlog::info("{}", *line);
  }
}

ThroughputLog::Load StepLoop::LoadNow() const {
  if (scheduler_ == nullptr) return {};
  const double num_blocks = scheduler_->num_blocks();
  return {.num_running = scheduler_->num_running(),
          .num_waiting = scheduler_->num_waiting(),
          .kv_cache_usage = 1 - scheduler_->num_free_blocks() / num_blocks};
}

void StepLoop::ReportLoad() {
  const ThroughputLog::Load load = LoadNow();
  metrics_.SetLoad(load.num_running, load.num_waiting, load.kv_cache_usage);
  board_.SetLoad({.num_running = load.num_running,
                  .num_waiting = load.num_waiting,
                  .num_free_kv_blocks = scheduler_ == nullptr ? 0 : scheduler_->num_free_blocks()});
  const std::lock_guard lock(mutex_);
  num_waiting_in_scheduler_ = load.num_waiting;
}

}  // namespace fathom
