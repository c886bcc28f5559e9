#include "coordinator/group_router.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "spdlog/spdlog.h"

namespace fathom {
namespace {

// What the groups of a server are together.
v1::ServerInfo AddUp(const std::vector<v1::ServerInfo>& groups) {
  if (groups.size() == 1) return groups[0];
  v1::ServerInfo sum = groups[0];
  sum.clear_state_detail();
  for (size_t i = 0; i < groups.size(); ++i) {
    const v1::ServerInfo& group = groups[i];
    if (group.state() == v1::ServerInfo::STATE_SERVING) sum.set_state(group.state());
    if (!group.state_detail().empty()) {
      absl::StrAppend(sum.mutable_state_detail(), sum.state_detail().empty() ? "" : "; ", "group ",
                      i, ": ", group.state_detail());
    }
    if (i == 0) continue;
    sum.set_epoch(std::max(sum.epoch(), group.epoch()));
    sum.set_steps(sum.steps() + group.steps());
    sum.set_num_workers(sum.num_workers() + group.num_workers());
    sum.set_block_size(std::max(sum.block_size(), group.block_size()));
    sum.set_num_kv_blocks(sum.num_kv_blocks() + group.num_kv_blocks());
    sum.set_num_free_kv_blocks(sum.num_free_kv_blocks() + group.num_free_kv_blocks());
    sum.set_num_running(sum.num_running() + group.num_running());
    sum.set_num_waiting(sum.num_waiting() + group.num_waiting());
  }
  return sum;
}

v1::ServerInfo InitialInfo(const GroupRouter::Options& options, int group) {
  v1::ServerInfo info;
  info.set_version(options.version);
  info.set_state(v1::ServerInfo::STATE_STARTING);
  info.set_num_workers(static_cast<uint32_t>(options.groups[group].group.addresses.size()));
  return info;
}

}  // namespace

// What a loop knows as the request's stream.
class GroupRouter::Route final : public TokenStream {
 public:
  Route(GroupRouter& router, RequestId id, std::shared_ptr<TokenStream> client)
      : router_(router), id_(id), client_(std::move(client)) {}

  RequestId id() const { return id_; }

  void OnTokens(v1::GenerateResponse response) override { client_->OnTokens(std::move(response)); }
  void OnEnd(const absl::Status& status) override {
    router_.OnEnd(id_);
    client_->OnEnd(status);
  }
  void Flush() override { client_->Flush(); }

 private:
  GroupRouter& router_;
  const RequestId id_;
  const std::shared_ptr<TokenStream> client_;
};

struct GroupRouter::Group {
  StatusBoard board;
  std::unique_ptr<Metrics> own_metrics;  // null for group 0
  Metrics& metrics;
  std::unique_ptr<GroupLoop> loop = nullptr;
  // Guarded by GroupRouter::mutex_.
  bool is_serving = false;
  int num_requests = 0;
  uint64_t last_choice = 0;
  PrefixIndex prefixes = {};
};

std::unique_ptr<GroupLoop> GroupRouter::MakeStepLoop(const StepLoop::Options& options,
                                                     StatusBoard& board, Metrics& metrics,
                                                     Engine::OnLost on_lost) {
  return std::make_unique<StepLoop>(options, board, metrics, std::move(on_lost));
}

GroupRouter::GroupRouter(Options options, Metrics& metrics,
                         std::function<void(bool serving)> on_serving_changed)
    : options_(std::move(options)),
      on_serving_changed_(std::move(on_serving_changed)),
      hasher_({}) {
  CHECK(!options_.groups.empty());
  for (int i = 0; i < static_cast<int>(options_.groups.size()); ++i) {
    auto own_metrics = i == 0 ? nullptr : std::make_unique<Metrics>(metrics, i);
    Metrics& group_metrics = i == 0 ? metrics : *own_metrics;
    // Not make_unique: it cannot fill an aggregate in place.
    groups_.push_back(std::unique_ptr<Group>(
        new Group{.board = StatusBoard(InitialInfo(options_, i),
                                       [this, i](bool serving) { OnServingChanged(i, serving); }),
                  .own_metrics = std::move(own_metrics),
                  .metrics = group_metrics}));
    Group& group = *groups_.back();
    group.loop = options_.make_loop(
        options_.groups[i], group.board, group.metrics,
        [this, i](std::vector<Inbox::Submission> unfinished) { OnLost(i, std::move(unfinished)); });
  }
}

GroupRouter::~GroupRouter() {
  Stop();
  Join();
}

void GroupRouter::Start() {
  watch_ = std::jthread([this](std::stop_token stop) { WatchOverRecovery(std::move(stop)); });
  for (const auto& group : groups_) group->loop->Start();
}

absl::StatusOr<RequestId> GroupRouter::Submit(std::shared_ptr<const Request> request,
                                              std::shared_ptr<TokenStream> stream) {
  Place place;
  if (groups_.size() > 1) place.chunks = PrefixIndex::ChunksOf(hasher_, *request);
  const std::lock_guard lock(mutex_);
  const RequestId id = last_id_ + 1;
  const LiveRequest live = {.request = std::move(request),
                            .stream = std::make_shared<Route>(*this, id, std::move(stream))};
  const size_t max_waiting = options_.groups.size() * options_.groups[0].max_queued_requests;
  if (live.request->sampling.has_grammar() && preparing_.size() >= max_waiting) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the queue is full: ", preparing_.size(),
                     " requests wait for their grammars (--max-queued-requests); try again later"));
  }
  absl::Status refusal;
  for (const int group : Ranking(place)) {
    const absl::Status entered = Enter(id, place, group, {.live = live});
    if (entered.ok()) {
      places_.emplace(last_id_ = id, std::move(place));
      return id;
    }
    refusal = entered;
  }
  if (!refusal.ok() && !absl::IsUnavailable(refusal)) return refusal;
  if (!MayWait()) {
    // The loop knows best why there is none.
    return refusal.ok() ? groups_[0]->loop->Submit(live).status() : refusal;
  }
  if (waiting_.size() >= max_waiting) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the queue is full: ", waiting_.size(),
                     " requests wait for workers (--max-queued-requests); try again later"));
  }
  places_.emplace(last_id_ = id, std::move(place));
  waiting_.emplace_back(id, live);
  return id;
}

void GroupRouter::Cancel(RequestId id) {
  std::optional<LiveRequest> forgotten;  // released after the lock
  const std::lock_guard lock(mutex_);
  const auto found = places_.find(id);
  if (found == places_.end()) return;
  if (auto preparing = preparing_.extract(id)) {
    forgotten = std::move(preparing.mapped().live);
  } else if (found->second.group != kNowhere) {
    groups_[found->second.group]->loop->Cancel(found->second.id);
  } else {
    const auto place = std::find_if(waiting_.begin(), waiting_.end(),
                                    [id](const auto& entry) { return entry.first == id; });
    if (place != waiting_.end()) {
      forgotten = std::move(place->second);
      waiting_.erase(place);
    }
  }
  Leave(found->second);
  places_.erase(found);
}

void GroupRouter::Drain() {
  {
    const std::lock_guard lock(mutex_);
    is_draining_ = true;
  }
  EndWaiting(absl::UnavailableError("the server is draining: it is about to stop; try again"));
  for (const auto& group : groups_) group->loop->Drain();
}

void GroupRouter::Stop() {
  {
    const std::lock_guard lock(mutex_);
    is_draining_ = true;
  }
  EndWaiting(absl::UnavailableError("the server is stopping; try again"));
  for (const auto& group : groups_) group->loop->Stop();
}

void GroupRouter::Join() {
  for (const auto& group : groups_) group->loop->Join();
  watch_.request_stop();
  if (watch_.joinable()) watch_.join();
}

v1::ServerInfo GroupRouter::server_info() const {
  std::vector<v1::ServerInfo> infos;
  for (const auto& group : groups_) infos.push_back(group->board.server_info());
  v1::ServerInfo sum = AddUp(infos);
  const std::lock_guard lock(mutex_);
  sum.set_num_waiting(sum.num_waiting() +
                      static_cast<uint32_t>(waiting_.size() + preparing_.size()));
  return sum;
}

std::optional<ModelLimits> GroupRouter::model_limits() const {
  std::optional<ModelLimits> least;
  for (const auto& group : groups_) {
    std::optional<ModelLimits> limits = group->board.model_limits();
    if (!limits.has_value()) continue;
    if (!least.has_value()) {
      least = std::move(limits);
      continue;
    }
    least->model.set_max_model_len(
        std::min(least->model.max_model_len(), limits->model.max_model_len()));
    least->kv_cache_tokens = std::min(least->kv_cache_tokens, limits->kv_cache_tokens);
  }
  return least;
}

bool GroupRouter::is_serving() const {
  return std::any_of(groups_.begin(), groups_.end(),
                     [](const auto& group) { return group->is_serving; });
}

// A group that serves but takes nothing has been lost, and is about to say so.
bool GroupRouter::MayWait() const {
  if (is_draining_ || options_.recovery_timeout == absl::ZeroDuration()) return false;
  return recover_until_.has_value() || is_serving();
}

std::vector<int> GroupRouter::Ranking(const Place& place) const {
  std::vector<int> ranking;
  for (int i = 0; i < static_cast<int>(groups_.size()); ++i) {
    if (groups_[i]->is_serving) ranking.push_back(i);
  }
  if (ranking.size() < 2) return ranking;
  std::sort(ranking.begin(), ranking.end(), [this](int a, int b) {
    const Group& left = *groups_[a];
    const Group& right = *groups_[b];
    return std::pair(left.num_requests, left.last_choice) <
           std::pair(right.num_requests, right.last_choice);
  });
  const int least = groups_[ranking[0]]->num_requests;
  auto best = ranking.end();
  int most_known = 0;
  for (auto i = ranking.begin(); i != ranking.end(); ++i) {
    const Group& group = *groups_[*i];
    const bool is_loaded = group.num_requests > least + std::max(kSlackRequests, least / 2);
    const int known = is_loaded ? 0 : group.prefixes.CountKnown(place.chunks);
    if (known > most_known) {
      most_known = known;
      best = i;
    }
  }
  if (best != ranking.end()) std::rotate(ranking.begin(), best, best + 1);
  return ranking;
}

void GroupRouter::Settle(Place& place, int group) {
  place.group = group;
  ++groups_[group]->num_requests;
  groups_[group]->last_choice = ++num_choices_;
  groups_[group]->prefixes.Use(place.chunks);
}

void GroupRouter::Leave(Place& place) {
  if (place.group != kNowhere) --groups_[place.group]->num_requests;
  place.group = kNowhere;
  place.id = 0;
}

absl::Status GroupRouter::Enter(RequestId id, Place& place, int group, const Preparing& request) {
  const v1::SamplingParams& sampling = request.live.request->sampling;
  if (sampling.has_grammar()) {
    RETURN_IF_ERROR(groups_[group]->loop->Prepare(
        sampling.grammar(), [this, id](const absl::Status& status) { OnPrepared(id, status); }));
    preparing_.emplace(id, request);
  } else {
    RETURN_IF_ERROR(Enqueue(place, group, request));
  }
  Settle(place, group);
  return absl::OkStatus();
}

absl::Status GroupRouter::Enqueue(Place& place, int group, const Preparing& request) {
  GroupLoop& loop = *groups_[group]->loop;
  ASSIGN_OR_RETURN(place.id,
                   request.is_new ? loop.Submit(request.live) : loop.Resume(request.live));
  if (!request.is_new) groups_[group]->metrics.CountResumedRequest();
  return absl::OkStatus();
}

// Whether a group took a request that was let in before.
bool GroupRouter::GoOn(RequestId id, Place& place, const LiveRequest& live) {
  std::vector<int> ranking = Ranking(place);
  // Who could not prepare its grammar may be about to say that it is lost.
  if (ranking.size() > 1) std::erase(ranking, place.silent_group);
  return std::any_of(ranking.begin(), ranking.end(), [&](int group) {
    return Enter(id, place, group, {.live = live, .is_new = false}).ok();
  });
}

std::optional<absl::Status> GroupRouter::GoOnSometime(RequestId id, Place& place,
                                                      LiveRequest live) {
  if (GoOn(id, place, live)) return std::nullopt;
  if (!MayWait()) {
    return absl::UnavailableError(absl::StrCat(
        "the request was not finished: ",
        is_draining_ ? "the server is stopping" : "the workers were lost", "; try again"));
  }
  waiting_.emplace_back(id, std::move(live));
  return std::nullopt;
}

void GroupRouter::OnPrepared(RequestId id, absl::Status status) {
  std::vector<Ended> ended;
  {
    const std::lock_guard lock(mutex_);
    auto preparing = preparing_.extract(id);
    if (!preparing) return;  // cancelled
    LiveRequest& live = preparing.mapped().live;
    Place& place = places_.at(id);
    if (status.ok()) status = Enqueue(place, place.group, preparing.mapped());
    if (status.ok()) {
      place.num_lost_preparations = 0;
      place.silent_group = kNowhere;
      return;
    }
    place.silent_group = place.group;
    Leave(place);
    std::optional<absl::Status> end = status;
    if (absl::IsUnavailable(status) && ++place.num_lost_preparations < kMaxLostPreparations) {
      end = GoOnSometime(id, place, live);
    } else if (absl::IsAborted(status)) {
      end = absl::UnavailableError(status.message());
    }
    if (!end.has_value()) return;
    groups_[0]->metrics.CountRefusedRequest(*end);
    ended.push_back({std::move(live.stream), *std::move(end)});
  }
  Tell(ended);
}

// Notes that the request lost its group; whether that happened too often.
bool GroupRouter::IsFutile(Place& place, const LiveRequest& live) {
  const size_t num_tokens = live.progress.generated_token_ids.size();
  if (num_tokens > std::exchange(place.num_tokens_when_lost, num_tokens)) {
    place.num_futile_losses = 0;
  }
  const bool was_computed =
      live.num_groups_lost > std::exchange(place.num_groups_lost, live.num_groups_lost);
  if (was_computed) ++place.num_futile_losses;
  return place.num_futile_losses >= kMaxFutileLosses;
}

void GroupRouter::OnServingChanged(int group, bool serving) {
  const std::lock_guard lock(mutex_);
  const bool was_serving = is_serving();
  groups_[group]->is_serving = serving;
  if (was_serving != is_serving()) on_serving_changed_(!was_serving);
  if (is_serving()) {
    recover_until_.reset();
    std::erase_if(waiting_, [this](const auto& entry) {
      return GoOn(entry.first, places_.at(entry.first), entry.second);
    });
  } else if (was_serving) {
    recover_until_ = absl::Now() + options_.recovery_timeout;
  }
  changed_.notify_all();
}

void GroupRouter::OnLost(int group, std::vector<Inbox::Submission> unfinished) {
  std::vector<Ended> ended;
  {
    const std::lock_guard lock(mutex_);
    groups_[group]->prefixes.Clear();  // they went with the workers
    for (Inbox::Submission& lost : unfinished) {
      LiveRequest& live = lost.live;
      // Every stream in a loop is a Route.
      const RequestId id = static_cast<const Route&>(*live.stream).id();
      const auto found = places_.find(id);
      if (found == places_.end()) continue;  // cancelled
      Place& place = found->second;
      Leave(place);
      if (IsFutile(place, live)) {
        ended.push_back(
            {std::move(live.stream), absl::UnavailableError(absl::StrCat(
                                         "the request was not finished: the workers were lost ",
                                         kMaxFutileLosses, " times while they computed it"))});
        continue;
      }
      const std::shared_ptr<TokenStream> stream = live.stream;
      if (const auto end = GoOnSometime(id, place, std::move(live))) {
        ended.push_back({stream, *end});
      }
    }
  }
  if (!unfinished.empty()) {
    spdlog::info("group {} was lost with {} requests; {} of them ended", group, unfinished.size(),
                 ended.size());
  }
  Tell(ended);
}

void GroupRouter::OnEnd(RequestId id) {
  const std::lock_guard lock(mutex_);
  const auto found = places_.find(id);
  if (found == places_.end()) return;
  Leave(found->second);
  places_.erase(found);
}

void GroupRouter::WatchOverRecovery(std::stop_token stop) {
  while (!stop.stop_requested()) {
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, stop, [this] { return recover_until_.has_value(); });
      if (!recover_until_.has_value()) return;  // stopped
      const absl::Time until = *recover_until_;
      const bool is_over = !changed_.wait_until(lock, stop, absl::ToChronoTime(until), [&] {
        return recover_until_ != until;
      }) && !stop.stop_requested();
      if (!is_over) continue;
      recover_until_.reset();
    }
    EndWaiting(absl::UnavailableError(
        absl::StrCat("the request was not finished: no workers were there for ",
                     absl::FormatDuration(options_.recovery_timeout),
                     " (--recovery-timeout-seconds); try again")));
  }
}

void GroupRouter::EndWaiting(const absl::Status& status) {
  std::vector<Ended> ended;
  {
    const std::lock_guard lock(mutex_);
    for (auto& [id, live] : std::exchange(waiting_, {})) {
      ended.push_back({std::move(live.stream), status});
    }
  }
  Tell(ended);
}

void GroupRouter::Tell(const std::vector<Ended>& ended) {
  for (const Ended& end : ended) end.stream->OnEnd(end.status);
  for (const Ended& end : ended) end.stream->Flush();
}

}  // namespace fathom
