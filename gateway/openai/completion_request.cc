#include "gateway/openai/completion_request.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "gateway/openai/errors.h"
#include "gateway/openai/json_fields.h"
#include "gateway/openai/unread_fields.h"

namespace fathom {
namespace {

namespace dom = simdjson::dom;

constexpr std::string_view kPromptTypes =
    "a string, a list of strings, a list of token ids or a list of lists of token ids";

absl::Status MissingPrompt() {
  return InvalidParameter("prompt",
                          "Either prompt or prompt_embeds must be provided and non-empty.");
}

absl::StatusOr<std::vector<CompletionPrompt>> ReadPrompts(const JsonFields& fields,
                                                          const ApiLimits& limits) {
  const std::optional<dom::element> value = fields.Find("prompt");
  if (!value) return MissingPrompt();
  std::vector<CompletionPrompt> prompts;
  std::string_view text;
  if (!value->get(text)) {
    if (text.empty()) return MissingPrompt();
    prompts.emplace_back(std::string(text));
    return prompts;
  }
  dom::array array;
  if (value->get(array)) return fields.WrongType("prompt", kPromptTypes);
  if (array.size() == 0) return MissingPrompt();
  if (array.at(0).is_number()) {  // one prompt of token ids
    std::vector<uint32_t> ids;
    RETURN_IF_ERROR(fields.ReadTokenIds("prompt", array, ids, kPromptTypes));
    prompts.emplace_back(std::move(ids));
    return prompts;
  }
  for (const dom::element element : array) {
    if (prompts.size() == limits.prompts) {
      return InvalidParameter("prompt", absl::StrCat("prompt list length exceeds the maximum "
                                                     "allowed count of ",
                                                     limits.prompts, "."));
    }
    dom::array ids;
    if (!element.get(text)) {
      prompts.emplace_back(std::string(text));
    } else if (!element.get(ids)) {
      std::vector<uint32_t> prompt;
      RETURN_IF_ERROR(fields.ReadTokenIds("prompt", ids, prompt, kPromptTypes));
      prompts.emplace_back(std::move(prompt));
    } else {
      return fields.WrongType("prompt", kPromptTypes);
    }
    if (prompts.back().index() != prompts.front().index()) {
      return fields.WrongType("prompt", kPromptTypes);
    }
  }
  return prompts;
}

absl::Status ReadLogprobs(const JsonFields& fields, const ApiLimits& limits,
                          CompletionRequest& request) {
  std::optional<int64_t> value;
  RETURN_IF_ERROR(fields.Read("logprobs", value));
  if (!value) return absl::OkStatus();
  if (*value < 0 || *value > limits.logprobs) {
    return InvalidParameter("logprobs", absl::StrCat("logprobs must be in [0, ", limits.logprobs,
                                                     "], got ", *value, "."));
  }
  request.num_logprobs = static_cast<uint32_t>(*value);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<CompletionRequest> ParseCompletionRequest(std::string_view body,
                                                         const SamplingDefaults& defaults,
                                                         const ApiLimits& limits) {
  ASSIGN_OR_RETURN(const JsonDocument document, JsonDocument::Parse(body, limits.json_depth));
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(document.root(), ""));
  CompletionRequest request;
  RETURN_IF_ERROR(CheckUnreadFields(fields, ApiRoute::kCompletions));
  RETURN_IF_ERROR(fields.Read("model", request.model));
  ASSIGN_OR_RETURN(request.parameters, ReadGenerationParameters(fields, defaults, limits));
  ASSIGN_OR_RETURN(request.prompts, ReadPrompts(fields, limits));
  if (request.prompts.size() * request.parameters.n > limits.choices) {
    return InvalidParameter(
        "n", absl::StrCat("prompts times n is ", request.prompts.size() * request.parameters.n,
                          ", limit ", limits.choices, "."));
  }
  RETURN_IF_ERROR(fields.Read("echo", request.echo));
  RETURN_IF_ERROR(fields.Read("add_special_tokens", request.add_special_tokens));
  RETURN_IF_ERROR(ReadLogprobs(fields, limits, request));
  int64_t max_tokens = request.max_tokens;
  RETURN_IF_ERROR(fields.Read("max_tokens", max_tokens));
  RETURN_IF_ERROR(
      CheckMaxTokens("max_tokens", max_tokens, request.echo ? 0 : 1, request.parameters));
  request.max_tokens = static_cast<uint32_t>(max_tokens);
  return request;
}

}  // namespace fathom
