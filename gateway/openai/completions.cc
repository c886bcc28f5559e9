#include "gateway/openai/completions.h"

#include <utility>

#include "base/status_macros.h"
#include "gateway/openai/answer.h"
#include "gateway/openai/completion_format.h"
#include "gateway/openai/errors.h"
#include "gateway/openai/generate_calls.h"
#include "gateway/openai/model_limits.h"
#include "gateway/text/detokenizer.h"

namespace fathom {
namespace {

CompletionFormatOptions FormatOptionsOf(const CompletionRequest& request, ResponseHeader header,
                                        std::vector<std::vector<uint32_t>> prompts,
                                        const Tokenizer* tokenizer) {
  const GenerationParameters& parameters = request.parameters;
  CompletionFormatOptions options;
  options.header = std::move(header);
  options.prompts = std::move(prompts);
  options.n = parameters.n;
  options.echo = request.echo;
  options.has_logprobs = request.num_logprobs.has_value();
  options.has_prompt_logprobs = parameters.num_prompt_logprobs.has_value();
  options.return_token_ids = parameters.return_token_ids;
  if (!request.echo) return options;
  for (size_t i = 0; i < options.prompts.size(); ++i) {
    std::string text;
    // As in vLLM, who takes the ids needs no text of the prompt.
    if (tokenizer != nullptr && !parameters.return_token_ids) {
      const std::string* sent = std::get_if<std::string>(&request.prompts[i]);
      if (sent != nullptr && !parameters.truncate_prompt_tokens) {
        text = *sent;
        if (request.add_special_tokens) {
          options.num_hidden = tokenizer->Encode("", BosPolicy::kAsConfigured).size();
        }
      } else {
        text = Decode(*tokenizer, options.prompts[i], {.skip_special_tokens = false});
      }
    }
    options.echo_texts.push_back(std::move(text));
  }
  return options;
}

CallOptions CallOptionsOf(const CompletionRequest& request, const std::string& id) {
  CallOptions options;
  options.id = id;
  options.max_tokens = request.max_tokens;
  options.num_logprobs = request.num_logprobs;
  options.num_prompt_logprobs = request.parameters.num_prompt_logprobs;
  if (request.echo && !options.num_prompt_logprobs) {
    options.num_prompt_logprobs = request.num_logprobs;
    // The coordinator reads a prompt without generating only for its logprobs.
    if (request.max_tokens == 0 && !request.num_logprobs) options.num_prompt_logprobs = 0;
  }
  return options;
}

}  // namespace

absl::StatusOr<CompletionRequest> CompletionsHandler::Parse(const HttpRequest& request) const {
  RETURN_IF_ERROR(CheckJsonContent(request));
  ASSIGN_OR_RETURN(CompletionRequest parsed,
                   ParseCompletionRequest(request.body, api_.defaults, api_.limits));
  RETURN_IF_ERROR(api_.model.CheckName(parsed.model));
  if (std::holds_alternative<std::string>(parsed.prompts.front())) {
    RETURN_IF_ERROR(api_.text.CheckHasText("prompt"));
  }
  if (!parsed.parameters.stop.empty()) RETURN_IF_ERROR(api_.text.CheckHasText("stop"));
  if (!parsed.parameters.bad_words.empty()) RETURN_IF_ERROR(api_.text.CheckHasText("bad_words"));
  return parsed;
}

Task<absl::StatusOr<std::vector<std::vector<uint32_t>>>> CompletionsHandler::EncodePrompts(
    CompletionRequest& request, size_t num_bytes) {
  std::vector<std::vector<uint32_t>> prompts(request.prompts.size());
  const BosPolicy bos_policy =
      request.add_special_tokens ? BosPolicy::kAsConfigured : BosPolicy::kNone;
  const auto encode = [&] {
    for (size_t i = 0; i < prompts.size(); ++i) {
      if (const auto* text = std::get_if<std::string>(&request.prompts[i])) {
        prompts[i] = api_.text.tokenizer()->Encode(*text, bos_policy);
      } else {
        prompts[i] = std::get<std::vector<uint32_t>>(request.prompts[i]);
      }
    }
    if (!request.parameters.bad_words.empty()) {
      AddBadWords(*api_.text.tokenizer(), request.parameters);
    }
  };
  if (std::holds_alternative<std::string>(request.prompts.front()) ||
      !request.parameters.bad_words.empty()) {
    co_await api_.text_threads.Run(num_bytes, encode);
  } else {
    encode();
  }
  const absl::StatusOr<v1::ModelInfo> info = co_await api_.model.Info();
  if (!info.ok()) co_return info.status();
  absl::Status status = CheckTokenIds(request.parameters, *info);
  for (std::vector<uint32_t>& prompt : prompts) {
    if (status.ok()) status = FitPrompt(request.parameters, request.max_tokens, *info, prompt);
  }
  if (!status.ok()) co_return status;
  co_return prompts;
}

Task<> CompletionsHandler::Answer(const CompletionRequest& request,
                                  std::vector<std::vector<uint32_t>> prompts, ResponseHeader header,
                                  ResponseWriter& writer) {
  const GenerationParameters& parameters = request.parameters;
  AnswerPlan plan;
  plan.calls = MakeCalls(prompts, parameters, CallOptionsOf(request, header.id));
  plan.num_prompts = static_cast<int>(prompts.size());
  plan.choice_options = ChoiceOptionsOf(parameters);
  plan.delivery = DeliveryOf(parameters);
  plan.grammar_param = GrammarParamOf(parameters);
  const Tokenizer* tokenizer = api_.text.tokenizer();
  CompletionFormat format(
      FormatOptionsOf(request, std::move(header), std::move(prompts), tokenizer),
      TokenNames(tokenizer, parameters.token_names));
  api_.metrics.OnRequestAdmitted(parameters.n);
  co_await fathom::Answer(std::move(plan), api_.coordinator, tokenizer, format, api_.text_threads,
                          api_.metrics, writer);
}

Task<> CompletionsHandler::Handle(const HttpRequest& http_request, ResponseWriter& writer) {
  ResponseHeader header = MakeResponseHeader("cmpl-", http_request, api_.model.name());
  writer.notes().id = header.id;
  const size_t num_bytes = http_request.body.size();
  absl::StatusOr<CompletionRequest> request;
  const auto parse = [&] { request = Parse(http_request); };
  co_await api_.text_threads.RunIfMuch(num_bytes, parse);
  if (!request.ok()) {
    co_await writer.Send(ErrorResponse(request.status()));
    co_return;
  }
  absl::StatusOr<std::vector<std::vector<uint32_t>>> prompts =
      co_await EncodePrompts(*request, num_bytes);
  if (!prompts.ok()) {
    co_await writer.Send(ErrorResponse(prompts.status()));
    co_return;
  }
  co_await Answer(*request, *std::move(prompts), std::move(header), writer);
}

}  // namespace fathom
