// From parameters and prompts to the coordinator's requests.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gateway/openai/answer.h"
#include "gateway/openai/generation_parameters.h"
#include "proto/generate.pb.h"

namespace fathom {

struct CallOptions {
  std::string id;  // of the response; each call gets it with its choice's index
  std::optional<uint32_t> max_tokens;
  std::optional<uint32_t> num_logprobs;
  std::optional<uint32_t> num_prompt_logprobs;
};

// One call for each choice, those of a prompt after each other. Choice i of a prompt has seed + i.
std::vector<v1::GenerateRequest> MakeCalls(const std::vector<std::vector<uint32_t>>& prompts,
                                           const GenerationParameters& parameters,
                                           const CallOptions& options);

// What to name when the calls' grammar is refused.
std::string GrammarParamOf(const GenerationParameters& parameters);

Delivery DeliveryOf(const GenerationParameters& parameters);

ChoiceOptions ChoiceOptionsOf(const GenerationParameters& parameters);

}  // namespace fathom
