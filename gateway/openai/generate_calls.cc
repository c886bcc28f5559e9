#include "gateway/openai/generate_calls.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace fathom {

std::vector<v1::GenerateRequest> MakeCalls(const std::vector<std::vector<uint32_t>>& prompts,
                                           const GenerationParameters& parameters,
                                           const CallOptions& options) {
  std::vector<v1::GenerateRequest> calls;
  for (const std::vector<uint32_t>& prompt : prompts) {
    for (int i = 0; i < parameters.n; ++i) {
      v1::GenerateRequest call;
      call.set_request_id(absl::StrCat(options.id, "-", calls.size()));
      call.mutable_prompt_token_ids()->Assign(prompt.begin(), prompt.end());
      *call.mutable_sampling() = parameters.sampling;
      v1::SamplingParams& sampling = *call.mutable_sampling();
      if (parameters.structured_output) {
        *sampling.mutable_grammar() = parameters.structured_output->grammar;
      }
      if (sampling.has_seed()) sampling.set_seed(sampling.seed() + static_cast<uint64_t>(i));
      if (options.num_logprobs) sampling.set_num_logprobs(*options.num_logprobs);
      if (options.num_prompt_logprobs) {
        sampling.set_num_prompt_logprobs(*options.num_prompt_logprobs);
      }
      if (options.max_tokens) call.set_max_tokens(*options.max_tokens);
      call.set_ignore_eos(parameters.ignore_eos);
      call.set_cache_salt(parameters.cache_salt);
      call.set_priority(parameters.priority);
      calls.push_back(std::move(call));
    }
  }
  return calls;
}

std::string GrammarParamOf(const GenerationParameters& parameters) {
  return parameters.structured_output ? parameters.structured_output->param : "";
}

Delivery DeliveryOf(const GenerationParameters& parameters) {
  if (!parameters.stream) return Delivery::kWhole;
  if (!parameters.include_usage) return Delivery::kStream;
  return parameters.continuous_usage_stats ? Delivery::kStreamWithContinuousUsage
                                           : Delivery::kStreamWithUsage;
}

ChoiceOptions ChoiceOptionsOf(const GenerationParameters& parameters) {
  ChoiceOptions options;
  options.detokenizer.skip_special_tokens = parameters.skip_special_tokens;
  options.stop = parameters.stop;
  options.stop_string = parameters.stop_string;
  options.min_tokens = parameters.sampling.min_tokens();
  return options;
}

}  // namespace fathom
