#include "coordinator/admission.h"

#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "coordinator/request_validation.h"

namespace fathom {
namespace {

// Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
uint64_t SplitMix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

Admission::Admission(uint64_t seed, GroupRouter& router, Metrics& metrics)
    : seed_(seed), router_(router), metrics_(metrics) {}

absl::StatusOr<RequestId> Admission::Submit(const v1::GenerateRequest& request,
                                            std::shared_ptr<TokenStream> stream) {
  absl::StatusOr<std::shared_ptr<const Request>> validated = Validate(request);
  absl::StatusOr<RequestId> id = validated.ok()
                                     ? router_.Submit(*std::move(validated), std::move(stream))
                                     : absl::StatusOr<RequestId>(validated.status());
  if (!id.ok()) metrics_.CountRefusedRequest(id.status());
  return id;
}

absl::StatusOr<std::shared_ptr<const Request>> Admission::Validate(
    const v1::GenerateRequest& request) {
  const std::optional<ModelLimits> limits = router_.model_limits();
  if (!limits.has_value()) {
    return absl::UnavailableError(
        absl::StrCat("the server is starting: ", router_.server_info().state_detail()));
  }
  return ValidateRequest(request, *limits, SplitMix64(SplitMix64(seed_) + ++num_requests_));
}

}  // namespace fathom
