// Any bytes as a GenerateRequest on the wire: refused, or what coordinator/request.h promises.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "base/check.h"
#include "coordinator/request_validation.h"
#include "google/protobuf/stubs/logging.h"

namespace fathom {
namespace {

ModelLimits Limits() {
  ModelLimits limits;
  limits.model.set_vocab_size(1000);
  limits.model.set_max_model_len(100);
  limits.model.add_eos_token_ids(3);
  limits.kv_cache_tokens = 80;
  return limits;
}

void Check(const v1::GenerateRequest& message) {
  const auto request = ValidateRequest(message, Limits(), /*default_seed=*/7);
  if (!request.ok()) {
    CHECK(request.status().code() == absl::StatusCode::kInvalidArgument) << request.status();
    CHECK(!request.status().message().empty());
    return;
  }
  const Request& valid = **request;
  CHECK_GT(valid.num_prompt_tokens(), 0);
  CHECK_GE(valid.max_tokens, 0);
  CHECK_LE(valid.max_total_tokens(), 80);
  CHECK_LE(valid.min_tokens, valid.max_tokens);
  CHECK_GE(valid.max_queue_milliseconds, 0);
  for (const uint32_t id : valid.prompt_token_ids) CHECK_LT(id, 1000u);
  CHECK(std::is_sorted(valid.stop_token_ids.begin(), valid.stop_token_ids.end()));
  const v1::SamplingParams& sampling = valid.sampling;
  CHECK(sampling.has_seed());
  CHECK(sampling.temperature() >= 0 && sampling.temperature() <= kMaxTemperature);
  CHECK(std::isfinite(sampling.presence_penalty()) && std::isfinite(sampling.frequency_penalty()));
  CHECK_LE(sampling.num_logprobs(), static_cast<uint32_t>(kMaxLogprobs));
}

}  // namespace
}  // namespace fathom

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const google::protobuf::LogSilencer
      silencer;  // it writes a line for each text not in UTF-8
  fathom::v1::GenerateRequest message;
  if (message.ParseFromArray(data, static_cast<int>(size))) fathom::Check(message);
  return 0;
}
