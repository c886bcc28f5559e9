#include "worker/blackboard.h"

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace fathom {

void BlackboardKeeper::BeginEpoch(uint64_t epoch) {
  absl::MutexLock lock(&mutex_);
  if (epoch <= epoch_) return;
  epoch_ = epoch;
  values_.erase(values_.begin(), values_.lower_bound({epoch, ""}));
}

void BlackboardKeeper::Close() {
  absl::MutexLock lock(&mutex_);
  closed_ = true;
}

absl::Status BlackboardKeeper::CheckEpoch(uint64_t epoch) const {
  if (closed_) return absl::UnavailableError("this worker is shutting down");
  if (epoch >= epoch_) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("epoch ", epoch, " is over, the current one is ", epoch_));
}

absl::Status BlackboardKeeper::Publish(uint64_t epoch, const std::string& key,
                                       const std::string& value) {
  absl::MutexLock lock(&mutex_);
  RETURN_IF_ERROR(CheckEpoch(epoch));
  if (key.size() + value.size() > kMaxValueBytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "key and value have ", key.size() + value.size(), " bytes, limit ", kMaxValueBytes));
  }
  if (values_.size() >= kMaxEntries) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the blackboard is full: ", kMaxEntries, " entries"));
  }
  const auto [entry, is_new] = values_.try_emplace({epoch, key}, value);
  if (is_new || entry->second == value) return absl::OkStatus();
  return absl::AlreadyExistsError(absl::StrCat("'", key, "' was published with another value"));
}

absl::StatusOr<std::string> BlackboardKeeper::Lookup(uint64_t epoch, const std::string& key,
                                                     absl::Time deadline) {
  absl::MutexLock lock(&mutex_);
  const auto settled = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return closed_ || epoch < epoch_ || values_.contains({epoch, key});
  };
  const bool in_time = mutex_.AwaitWithDeadline(absl::Condition(&settled), deadline);
  RETURN_IF_ERROR(CheckEpoch(epoch));
  if (!in_time) {
    return absl::DeadlineExceededError(absl::StrCat("'", key, "' was not published in time"));
  }
  return values_.at({epoch, key});
}

}  // namespace fathom
