// Any bytes as the body of a completion: refused, or within every limit.
#include <cmath>
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "gateway/openai/completion_request.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  constexpr fathom::ApiLimits kLimits;
  const std::string_view body(reinterpret_cast<const char*>(data), size);
  const auto request = fathom::ParseCompletionRequest(body, {}, kLimits);
  if (!request.ok()) {
    CHECK(!request.status().message().empty());
    return 0;
  }
  const fathom::GenerationParameters& parameters = request->parameters;
  CHECK(!request->prompts.empty());
  CHECK_LE(request->prompts.size(), kLimits.prompts);
  CHECK_LE(parameters.n, kLimits.n);
  CHECK_GE(parameters.n, 1);
  CHECK_LE(request->prompts.size() * parameters.n, kLimits.choices);
  CHECK_LE(parameters.stop.size(), kLimits.stop_strings);
  for (const std::string& stop : parameters.stop) {
    CHECK(!stop.empty());
    CHECK_LE(stop.size(), kLimits.stop_string_bytes);
  }
  CHECK_LE(request->num_logprobs.value_or(0), kLimits.logprobs);
  CHECK(request->echo || request->max_tokens > 0);
  CHECK(std::isfinite(parameters.sampling.temperature()));
  CHECK(parameters.sampling.temperature() >= 0);
  CHECK(parameters.sampling.top_p() > 0 && parameters.sampling.top_p() <= 1);
  return 0;
}
