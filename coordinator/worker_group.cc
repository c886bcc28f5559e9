#include "coordinator/worker_group.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"

namespace fathom {
namespace {

// How long after a first failure a lost connection is waited for. Workers on this host see each
// other's absence within milliseconds, and so do we.
constexpr absl::Duration kCauseGrace = absl::Milliseconds(50);

}  // namespace

WorkerGroup::WorkerGroup(Options options, std::function<void()> on_event)
    : options_(std::move(options)),
      on_event_(std::move(on_event)),
      last_step_answered_(options_.worker_names.size()),
      is_silent_(options_.worker_names.size()) {
  CHECK(!options_.worker_names.empty());
}

// The transport goes first: until it has, it reports.
WorkerGroup::~WorkerGroup() { transport_.reset(); }

void WorkerGroup::Connect(std::unique_ptr<Transport> transport) {
  CHECK(transport_ == nullptr);
  transport_ = std::move(transport);
}

void WorkerGroup::Send(const v1::StepCommand& command, absl::Duration now) {
  CHECK_EQ(command.epoch(), options_.epoch);
  {
    const std::lock_guard lock(mutex_);
    CHECK_EQ(command.step(), last_step_sent_ + 1);
    if (last_step_sent_ == last_step_taken_) step_deadline_ = now + options_.step_timeout;
    last_step_sent_ = command.step();
  }
  transport_->Send(command);
}

std::optional<v1::StepResult> WorkerGroup::TakeResult(absl::Duration now) {
  const std::lock_guard lock(mutex_);
  if (last_step_taken_ == last_step_sent_ || !AllAnswered(last_step_taken_ + 1)) {
    return std::nullopt;
  }
  ++last_step_taken_;
  step_deadline_ =
      last_step_taken_ == last_step_sent_ ? absl::InfiniteDuration() : now + options_.step_timeout;
  CHECK(!results_.empty());
  CHECK_EQ(results_.front().step(), last_step_taken_);
  v1::StepResult result = std::move(results_.front());
  results_.pop_front();
  return result;
}

absl::Status WorkerGroup::Check(absl::Duration now) {
  const std::lock_guard lock(mutex_);
  const uint64_t due_step = last_step_taken_ + 1;
  if (failures_.empty() && now >= step_deadline_ && !AllAnswered(due_step)) {
    std::vector<std::string> silent;
    for (size_t rank = 0; rank < last_step_answered_.size(); ++rank) {
      if (last_step_answered_[rank] < due_step) silent.push_back(options_.worker_names[rank]);
    }
    failures_.push_back(absl::UnavailableError(
        absl::StrCat(absl::StrJoin(silent, ", "), " did not finish step ", due_step, " within ",
                     absl::FormatDuration(options_.step_timeout))));
  }
  if (failures_.empty()) return absl::OkStatus();
  cause_deadline_ = std::min(cause_deadline_, now + kCauseGrace);
  return failures_.front();
}

void WorkerGroup::Break(absl::Status cause) {
  {
    const std::lock_guard lock(mutex_);
    failures_.push_back(std::move(cause));
  }
  on_event_();
}

std::optional<absl::Status> WorkerGroup::Cause(absl::Duration now) {
  const std::lock_guard lock(mutex_);
  const auto lost = std::find_if(failures_.begin(), failures_.end(), absl::IsUnavailable);
  if (lost != failures_.end()) return *lost;
  if (failures_.empty() || now < cause_deadline_) return std::nullopt;
  return failures_.front();
}

std::string WorkerGroup::SilentWorkers() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::string> silent;
  for (size_t rank = 0; rank < is_silent_.size(); ++rank) {
    if (is_silent_[rank]) silent.push_back(options_.worker_names[rank]);
  }
  return absl::StrJoin(silent, ", ");
}

absl::Duration WorkerGroup::deadline() const {
  return cause_deadline_ == absl::InfiniteDuration() ? step_deadline_ : cause_deadline_;
}

bool WorkerGroup::AllAnswered(uint64_t step) const {
  return std::all_of(last_step_answered_.begin(), last_step_answered_.end(),
                     [step](uint64_t answered) { return answered >= step; });
}

void WorkerGroup::OnResult(int rank, v1::StepResult result) {
  const uint64_t epoch = result.epoch();
  const uint64_t step = result.step();
  {
    const std::lock_guard lock(mutex_);
    const bool is_due = step == last_step_answered_[rank] + 1 && step <= last_step_sent_;
    if (epoch == options_.epoch && is_due) {
      last_step_answered_[rank] = step;
      if (rank == 0) results_.push_back(std::move(result));
      if (!AllAnswered(step)) return;
    } else {
      failures_.push_back(absl::InternalError(absl::StrCat(
          worker_name(rank), " answered step ", step, " of epoch ", epoch, " out of turn")));
    }
  }
  on_event_();
}

void WorkerGroup::OnStreamEnded(int rank, const absl::Status& status) {
  // While the group is being destroyed this is what was asked for; then nobody looks.
  const std::string& name = worker_name(rank);
  if (absl::IsUnavailable(status)) {
    return Break(absl::UnavailableError(absl::StrCat(name, " was lost: ", status.message())));
  }
  if (!status.ok()) {
    return Break(absl::Status(status.code(), absl::StrCat(name, " failed: ", status.message())));
  }
  Break(absl::UnavailableError(absl::StrCat(name, " left the group")));
}

void WorkerGroup::OnSilence(int rank, bool is_silent) {
  {
    const std::lock_guard lock(mutex_);
    is_silent_[rank] = is_silent;
  }
  on_event_();
}

}  // namespace fathom
