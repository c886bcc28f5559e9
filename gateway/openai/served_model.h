// The one model this gateway serves: its names, and what the coordinator says of it.
//
// I/O thread only.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gateway/http/task.h"
#include "gateway/rpc/coordinator_client.h"
#include "proto/generate.pb.h"

namespace fathom {

struct ServedModelOptions {
  std::vector<std::string> names;  // at least one; the first is the one reported
  std::string root;                // where it was loaded from, for /v1/models
  // The coordinator is asked again after that long: it may have been restarted with other limits.
  std::chrono::milliseconds refresh_interval{5'000};
};

class ServedModel {
 public:
  // `coordinator` must outlive this.
  ServedModel(ServedModelOptions options, CoordinatorClient& coordinator);

  const std::string& name() const { return options_.names.front(); }
  const std::vector<std::string>& names() const { return options_.names; }
  const std::string& root() const { return options_.root; }
  int64_t created() const { return created_; }  // seconds since 1970

  // NotFound unless `name` is one of the names; a request need not name a model.
  absl::Status CheckName(const std::optional<std::string>& name) const;

  // Vocabulary and limits. Unavailable when the coordinator cannot be reached or has no workers.
  Task<absl::StatusOr<v1::ModelInfo>> Info();

 private:
  const ServedModelOptions options_;
  const int64_t created_;
  CoordinatorClient& coordinator_;
  v1::ModelInfo info_;
  std::optional<std::chrono::steady_clock::time_point> info_time_;
};

}  // namespace fathom
