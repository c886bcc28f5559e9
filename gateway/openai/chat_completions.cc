#include "gateway/openai/chat_completions.h"

#include <utility>

#include "base/status_macros.h"
#include "gateway/openai/answer.h"
#include "gateway/openai/chat_format.h"
#include "gateway/openai/chat_grammar.h"
#include "gateway/openai/errors.h"
#include "gateway/openai/generate_calls.h"
#include "gateway/openai/model_limits.h"

namespace fathom {
namespace {

ChatFormatOptions FormatOptionsOf(const ChatRequest& request, ResponseHeader header,
                                  std::vector<uint32_t> prompt) {
  const GenerationParameters& parameters = request.parameters;
  ChatFormatOptions options;
  options.header = std::move(header);
  options.prompt = std::move(prompt);
  options.n = parameters.n;
  options.has_logprobs = request.num_logprobs.has_value();
  options.has_prompt_logprobs = parameters.num_prompt_logprobs.has_value();
  options.return_token_ids = parameters.return_token_ids;
  const ChatMessage& last = request.prompt.messages.back();
  if (request.echo && last.role == ChatMessage::Role::kAssistant) {
    options.echo_text = last.content.value_or("");
  }
  return options;
}

OutputParserOptions ParserOptionsOf(const ChatRequest& request, const ChatEncoder& encoder) {
  OutputParserOptions options;
  options.syntax = encoder.layout().syntax;
  options.begins_in_thinking =
      encoder.EndsInThinking(request.prompt.messages, request.prompt.options);
  options.include_reasoning = request.include_reasoning;
  options.calls_tools = request.tool_calls != ToolCalls::kNone;
  options.only_one_call = request.tool_calls == ToolCalls::kOne;
  if (!request.call_id_prefix.empty()) {
    options.make_call_id = [prefix = request.call_id_prefix] {
      return prefix + RandomHex().substr(0, 24);
    };
  } else if (options.syntax.tools == ToolSyntax::kDsml) {  // as vLLM's parsers call them
    options.make_call_id = [] { return "call_" + RandomHex().substr(0, 24); };
  } else {
    options.make_call_id = [] { return "chatcmpl-tool-" + RandomHex(); };
  }
  return options;
}

}  // namespace

Task<absl::StatusOr<std::vector<uint32_t>>> EncodeChat(const ChatPrompt& prompt, size_t num_bytes,
                                                       const ModelText& text,
                                                       BackgroundThreads& text_threads) {
  absl::StatusOr<std::vector<uint32_t>> token_ids = std::vector<uint32_t>();
  const auto encode = [&] {
    const ChatEncoder& encoder = text.chat_encoder();
    if (const absl::Status tools = encoder.CheckTools(prompt.options.tools); !tools.ok()) {
      token_ids = InvalidParameter("tools", std::string(tools.message()));
      return;
    }
    const absl::StatusOr<std::string> encoded = encoder.Encode(prompt.messages, prompt.options);
    if (!encoded.ok()) {
      token_ids = InvalidParameter("messages", std::string(encoded.status().message()));
      return;
    }
    *token_ids = text.tokenizer()->Encode(
        *encoded, prompt.add_special_tokens ? BosPolicy::kAsConfigured : BosPolicy::kNone);
  };
  co_await text_threads.Run(num_bytes, encode);
  co_return token_ids;
}

Task<absl::StatusOr<std::vector<uint32_t>>> EncodeChatRequest(ChatRequest& request,
                                                              size_t num_bytes, const Api& api) {
  absl::StatusOr<std::vector<uint32_t>> prompt =
      co_await EncodeChat(request.prompt, num_bytes, api.text, api.text_threads);
  if (!prompt.ok()) co_return prompt.status();
  if (!request.parameters.bad_words.empty()) {
    const auto add = [&] { AddBadWords(*api.text.tokenizer(), request.parameters); };
    co_await api.text_threads.Run(num_bytes, add);
  }
  const absl::StatusOr<v1::ModelInfo> info = co_await api.model.Info();
  if (!info.ok()) co_return info.status();
  absl::Status status = CheckTokenIds(request.parameters, *info);
  if (status.ok()) status = FitGrammar(request, api.text);
  if (status.ok()) status = FitPrompt(request.parameters, request.max_tokens, *info, *prompt);
  if (!status.ok()) co_return status;
  co_return prompt;
}

AnswerPlan PlanChatAnswer(const ChatRequest& request, const std::vector<uint32_t>& prompt,
                          const std::string& id, const Api& api) {
  const GenerationParameters& parameters = request.parameters;
  CallOptions call_options;
  call_options.id = id;
  call_options.max_tokens = request.max_tokens;
  call_options.num_logprobs = request.num_logprobs;
  call_options.num_prompt_logprobs = parameters.num_prompt_logprobs;
  AnswerPlan plan;
  plan.calls = MakeCalls({prompt}, parameters, call_options);
  plan.choice_options = ChoiceOptionsOf(parameters);
  plan.choice_options.parser = ParserOptionsOf(request, api.text.chat_encoder());
  plan.choice_options.markers = &api.text.output_markers();
  plan.choice_options.ends_as_call = request.ends_as_call;
  plan.delivery = DeliveryOf(parameters);
  plan.grammar_param = GrammarParamOf(parameters);
  return plan;
}

absl::StatusOr<ChatRequest> ChatCompletionsHandler::Parse(const HttpRequest& request) const {
  RETURN_IF_ERROR(CheckJsonContent(request));
  ASSIGN_OR_RETURN(ChatRequest parsed, ParseChatRequest(request.body, api_.defaults, api_.limits));
  RETURN_IF_ERROR(api_.model.CheckName(parsed.model));
  RETURN_IF_ERROR(api_.text.CheckHasChat());
  return parsed;
}

Task<> ChatCompletionsHandler::Answer(const ChatRequest& request, std::vector<uint32_t> prompt,
                                      ResponseHeader header, ResponseWriter& writer) {
  const GenerationParameters& parameters = request.parameters;
  AnswerPlan plan = PlanChatAnswer(request, prompt, header.id, api_);
  ChatFormat format(FormatOptionsOf(request, std::move(header), std::move(prompt)),
                    TokenNames(api_.text.tokenizer(), parameters.token_names));
  api_.metrics.OnRequestAdmitted(parameters.n);
  co_await fathom::Answer(std::move(plan), api_.coordinator, api_.text.tokenizer(), format,
                          api_.text_threads, api_.metrics, writer);
}

Task<> ChatCompletionsHandler::Handle(const HttpRequest& http_request, ResponseWriter& writer) {
  ResponseHeader header = MakeResponseHeader("chatcmpl-", http_request, api_.model.name());
  writer.notes().id = header.id;
  const size_t num_bytes = http_request.body.size();
  absl::StatusOr<ChatRequest> request;
  const auto parse = [&] { request = Parse(http_request); };
  co_await api_.text_threads.RunIfMuch(num_bytes, parse);
  if (!request.ok()) {
    co_await writer.Send(ErrorResponse(request.status()));
    co_return;
  }
  absl::StatusOr<std::vector<uint32_t>> prompt =
      co_await EncodeChatRequest(*request, num_bytes, api_);
  if (!prompt.ok()) {
    co_await writer.Send(ErrorResponse(prompt.status()));
    co_return;
  }
  co_await Answer(*request, *std::move(prompt), std::move(header), writer);
}

}  // namespace fathom
