#include "gateway/openai/model_limits.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "gateway/openai/errors.h"

namespace fathom {
namespace {

absl::Status TruncatePrompt(const GenerationParameters& parameters, uint32_t max_tokens,
                            const v1::ModelInfo& model, std::vector<uint32_t>& prompt) {
  if (!parameters.truncate_prompt_tokens) return absl::OkStatus();
  const int64_t fits = int64_t{model.max_model_len()} - max_tokens;
  const int64_t wanted =
      *parameters.truncate_prompt_tokens == -1 ? fits : *parameters.truncate_prompt_tokens;
  if (wanted > fits) {
    return InvalidParameter(
        "truncate_prompt_tokens",
        absl::StrCat("truncate_prompt_tokens=", wanted, " cannot be greater than ", fits,
                     ", the model's context length less max_tokens. Please request a smaller "
                     "truncation size."));
  }
  if (static_cast<int64_t>(prompt.size()) > wanted && wanted > 0) {
    prompt.erase(prompt.begin(), prompt.end() - wanted);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckInVocabulary(std::string_view param, absl::Span<const uint32_t> token_ids,
                               const v1::ModelInfo& model) {
  for (const uint32_t token_id : token_ids) {
    if (token_id < model.vocab_size()) continue;
    return InvalidParameter(
        param, absl::StrCat("Token id ", token_id, " in ", std::string(param),
                            " is out of vocabulary. Vocabulary size: ", model.vocab_size()));
  }
  return absl::OkStatus();
}

absl::Status CheckTokenIds(const GenerationParameters& parameters, const v1::ModelInfo& model) {
  const v1::SamplingParams& sampling = parameters.sampling;
  for (const v1::LogitBias& entry : sampling.logit_bias()) {
    RETURN_IF_ERROR(CheckInVocabulary("logit_bias", {entry.token_id()}, model));
  }
  RETURN_IF_ERROR(CheckInVocabulary("stop_token_ids", sampling.stop_token_ids(), model));
  RETURN_IF_ERROR(CheckInVocabulary("allowed_token_ids", sampling.allowed_token_ids(), model));
  for (const v1::TokenSequence& word : sampling.bad_words()) {
    RETURN_IF_ERROR(CheckInVocabulary("bad_words", word.token_ids(), model));
  }
  return absl::OkStatus();
}

absl::Status FitPrompt(const GenerationParameters& parameters, std::optional<uint32_t> max_tokens,
                       const v1::ModelInfo& model, std::vector<uint32_t>& prompt) {
  const uint32_t requested = max_tokens.value_or(1);
  RETURN_IF_ERROR(TruncatePrompt(parameters, requested, model, prompt));
  if (prompt.empty()) {
    return InvalidParameter("prompt", "The prompt has no tokens, expected at least one.");
  }
  RETURN_IF_ERROR(CheckInVocabulary("prompt", prompt, model));
  const uint32_t limit = model.max_model_len();
  if (prompt.size() + requested <= limit) return absl::OkStatus();
  return InvalidParameter(
      "input_tokens",
      absl::StrCat("You passed ", prompt.size(), " input tokens and requested ", requested,
                   " output tokens. However, the model's context length is only ", limit,
                   " tokens, resulting in a maximum input length of ",
                   limit - std::min(requested, limit),
                   " tokens. Please reduce the length of the input prompt, or max_tokens."));
}

}  // namespace fathom
