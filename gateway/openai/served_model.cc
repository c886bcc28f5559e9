#include "gateway/openai/served_model.h"

#include <algorithm>
#include <ctime>
#include <utility>

#include "base/check.h"
#include "gateway/openai/errors.h"

namespace fathom {

ServedModel::ServedModel(ServedModelOptions options, CoordinatorClient& coordinator)
    : options_(std::move(options)), created_(std::time(nullptr)), coordinator_(coordinator) {
  CHECK(!options_.names.empty());
}

absl::Status ServedModel::CheckName(const std::optional<std::string>& name) const {
  if (!name || name->empty()) return absl::OkStatus();
  const bool known =
      std::find(options_.names.begin(), options_.names.end(), *name) != options_.names.end();
  return known ? absl::OkStatus() : ModelNotFound(*name);
}

Task<absl::StatusOr<v1::ModelInfo>> ServedModel::Info() {
  const auto now = std::chrono::steady_clock::now();
  if (info_time_ && now - *info_time_ < options_.refresh_interval) co_return info_;
  absl::StatusOr<v1::ModelInfo> info = co_await coordinator_.GetModelInfo();
  if (!info.ok()) co_return info.status();
  info_ = *info;
  info_time_ = now;
  co_return info_;
}

}  // namespace fathom
