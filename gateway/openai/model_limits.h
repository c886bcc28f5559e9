// What only the model can tell of a request: whether token ids are in its vocabulary, and whether
// prompt and answer fit its length. InvalidArgument names the field.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "gateway/openai/generation_parameters.h"
#include "proto/generate.pb.h"

namespace fathom {

absl::Status CheckInVocabulary(std::string_view param, absl::Span<const uint32_t> token_ids,
                               const v1::ModelInfo& model);

// All that the parameters name.
absl::Status CheckTokenIds(const GenerationParameters& parameters, const v1::ModelInfo& model);

// Leaves the last truncate_prompt_tokens of `prompt`, if the client wants that, and checks it.
// `max_tokens` absent: up to the model's limit, at least 1.
absl::Status FitPrompt(const GenerationParameters& parameters, std::optional<uint32_t> max_tokens,
                       const v1::ModelInfo& model, std::vector<uint32_t>& prompt);

}  // namespace fathom
