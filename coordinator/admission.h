// The door for requests: validates them, whoever sent them, and hands them to GroupRouter.
//
// A request without a seed gets one drawn from --seed and the request's number since the start
// (SplitMix64 of both), so the same requests in the same order get the same tokens again. Those
// that are refused are counted.
//
// Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "coordinator/group_router.h"
#include "coordinator/metrics.h"
#include "coordinator/token_stream.h"
#include "proto/generate.pb.h"

namespace fathom {

class Admission {
 public:
  // All references outlive this.
  Admission(uint64_t seed, GroupRouter& router, Metrics& metrics);

  // The request's tokens go to `stream` from now on. Errors are those of ValidateRequest and
  // GroupRouter::Submit; then `stream` hears nothing. What is wrong with a grammar comes later, as
  // the end of `stream`.
  absl::StatusOr<RequestId> Submit(const v1::GenerateRequest& request,
                                   std::shared_ptr<TokenStream> stream);

  void Cancel(RequestId id) { router_.Cancel(id); }

 private:
  absl::StatusOr<std::shared_ptr<const Request>> Validate(const v1::GenerateRequest& request);

  const uint64_t seed_;
  GroupRouter& router_;
  Metrics& metrics_;
  std::atomic<uint64_t> num_requests_ = 0;
};

}  // namespace fathom
