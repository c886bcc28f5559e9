// absl::Status and grpc::Status are the same thing under two names; their codes have the same
// numbers. Thread-safe (pure functions).
#pragma once

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "grpcpp/support/status.h"
#include "proto/retry_after.h"

namespace fathom {

inline grpc::Status ToGrpc(const absl::Status& status) {
  const std::optional<int> retry_after = RetryAfterOf(status);
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), std::string(status.message()),
                      retry_after.has_value() ? std::to_string(*retry_after) : std::string());
}

inline absl::Status FromGrpc(const grpc::Status& status) {
  absl::Status converted(static_cast<absl::StatusCode>(status.error_code()),
                         status.error_message());
  int retry_after = 0;
  if (absl::SimpleAtoi(status.error_details(), &retry_after)) SetRetryAfter(converted, retry_after);
  return converted;
}

}  // namespace fathom
