#include "gateway/openai/chat_request.h"

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "gateway/openai/errors.h"
#include "gateway/openai/unread_fields.h"

namespace fathom {
namespace {

namespace dom = simdjson::dom;

// A string, or a list of {"type": "text", "text": …}.
absl::Status ReadContent(const JsonFields& fields, std::optional<std::string>& content) {
  const std::optional<dom::element> value = fields.Find("content");
  if (!value) return absl::OkStatus();
  std::string_view text;
  if (!value->get(text)) {
    content = std::string(text);
    return absl::OkStatus();
  }
  dom::array parts;
  if (value->get(parts)) return fields.WrongType("content", "a string or a list of text parts");
  std::string joined;
  bool first = true;
  for (const dom::element element : parts) {
    ASSIGN_OR_RETURN(const JsonFields part, JsonFields::Of(element, fields.NameOf("content")));
    std::optional<std::string> type, part_text;
    RETURN_IF_ERROR(part.Read("type", type));
    if (type && *type != "text") {
      return InvalidParameter(part.NameOf("type"), absl::StrCat("content parts of type '", *type,
                                                                "' are not supported, expected "
                                                                "'text'"));
    }
    RETURN_IF_ERROR(part.Read("text", part_text));
    if (!part_text) return part.WrongType("text", "a string");
    if (!std::exchange(first, false)) joined += '\n';
    joined += *part_text;
  }
  content = std::move(joined);
  return absl::OkStatus();
}

absl::Status ReadToolCalls(const JsonFields& fields, std::vector<ChatToolCall>& calls) {
  const std::optional<dom::element> value = fields.Find("tool_calls");
  if (!value) return absl::OkStatus();
  dom::array array;
  if (value->get(array)) return fields.WrongType("tool_calls", "a list of tool calls");
  for (const dom::element element : array) {
    ASSIGN_OR_RETURN(const JsonFields call, JsonFields::Of(element, fields.NameOf("tool_calls")));
    const std::optional<dom::element> function = call.Find("function");
    if (!function) return call.WrongType("function", "an object");
    ASSIGN_OR_RETURN(const JsonFields named, JsonFields::Of(*function, call.NameOf("function")));
    std::optional<std::string> id, type, name, arguments;
    RETURN_IF_ERROR(call.Read("id", id));
    RETURN_IF_ERROR(call.Read("type", type));
    RETURN_IF_ERROR(named.Read("name", name));
    RETURN_IF_ERROR(named.Read("arguments", arguments));
    if (!name) return named.WrongType("name", "a string");
    if (!arguments) return named.WrongType("arguments", "a string");
    calls.push_back(
        {id.value_or(""), type.value_or("function"), *std::move(name), *std::move(arguments)});
  }
  return absl::OkStatus();
}

absl::StatusOr<ChatMessage::Role> RoleOf(const std::string& role, const JsonFields& fields) {
  if (role == "system" || role == "developer") return ChatMessage::Role::kSystem;
  if (role == "user") return ChatMessage::Role::kUser;
  if (role == "assistant") return ChatMessage::Role::kAssistant;
  if (role == "tool") return ChatMessage::Role::kTool;
  return InvalidParameter(fields.NameOf("role"), absl::StrCat(fields.NameOf("role"),
                                                              " must be system, developer, user, "
                                                              "assistant or tool, got '",
                                                              role, "'."));
}

// Fields that only some encodings print.
absl::Status ReadMore(const JsonFields& fields, ChatMessage& message) {
  std::optional<std::string> name, tool_call_id, reasoning;
  RETURN_IF_ERROR(fields.Read("name", name));
  RETURN_IF_ERROR(fields.Read("tool_call_id", tool_call_id));
  message.name = name.value_or("");
  message.tool_call_id = tool_call_id.value_or("");
  if (message.role != ChatMessage::Role::kAssistant) return absl::OkStatus();
  if (fields.Find("function_call")) {
    const std::string field = fields.NameOf("function_call");
    return InvalidParameter(field, absl::StrCat(field, " is not supported: use tool_calls"));
  }
  RETURN_IF_ERROR(fields.Read("reasoning", reasoning));
  RETURN_IF_ERROR(fields.Read("reasoning_content", reasoning));
  message.reasoning = reasoning.value_or("");
  RETURN_IF_ERROR(fields.Read("prefix", message.prefix));
  return ReadToolCalls(fields, message.tool_calls);
}

absl::StatusOr<ChatMessage> ReadMessage(dom::element element, std::string name) {
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(element, std::move(name)));
  std::optional<std::string> role;
  RETURN_IF_ERROR(fields.Read("role", role));
  if (!role) return fields.WrongType("role", "a string");
  ChatMessage message;
  ASSIGN_OR_RETURN(message.role, RoleOf(*role, fields));
  RETURN_IF_ERROR(ReadContent(fields, message.content));
  RETURN_IF_ERROR(ReadMore(fields, message));
  const bool may_lack_content = !message.tool_calls.empty();
  if (!message.content && !may_lack_content) return fields.WrongType("content", "a string");
  return message;
}

// The template of the served model is fixed; its only switches are these, where it has them.
absl::Status ReadTemplateFields(const JsonFields& fields, ChatOptions& options) {
  if (fields.Find("chat_template")) {
    return InvalidParameter("chat_template",
                            "Chat template is passed with request, but the server uses only its "
                            "own encoding of the served model.");
  }
  RETURN_IF_ERROR(ReadEffort(fields, "reasoning_effort", options.thinking).status());
  const std::optional<dom::element> value = fields.Find("chat_template_kwargs");
  if (!value) return absl::OkStatus();
  ASSIGN_OR_RETURN(const JsonFields kwargs, JsonFields::Of(*value, "chat_template_kwargs"));
  for (const dom::key_value_pair field : dom::object(*value)) {
    if (field.key == "thinking" || field.key == "enable_thinking") continue;
    return InvalidParameter("chat_template_kwargs",
                            absl::StrCat("chat_template_kwargs: '", std::string(field.key),
                                         "' is not known, expected thinking or enable_thinking"));
  }
  RETURN_IF_ERROR(kwargs.Read("enable_thinking", options.thinking));
  return kwargs.Read("thinking", options.thinking);
}

// Which end the prompt has.
absl::Status ReadPromptEnd(const JsonFields& fields, ChatPrompt& prompt) {
  RETURN_IF_ERROR(fields.Read("add_generation_prompt", prompt.options.add_generation_prompt));
  RETURN_IF_ERROR(fields.Read("continue_final_message", prompt.options.continue_final_message));
  if (prompt.messages.back().prefix) {
    prompt.options.continue_final_message = true;
    prompt.options.add_generation_prompt = false;
  }
  if (prompt.options.continue_final_message && prompt.options.add_generation_prompt) {
    return InvalidParameter(
        "continue_final_message",
        "Cannot set both `continue_final_message` and `add_generation_prompt` to True.");
  }
  return absl::OkStatus();
}

absl::Status ReadLogprobs(const JsonFields& fields, const ApiLimits& limits, ChatRequest& request) {
  bool logprobs = false;
  RETURN_IF_ERROR(fields.Read("logprobs", logprobs));
  ASSIGN_OR_RETURN(const uint32_t top_logprobs, ReadTopLogprobs(fields, limits));
  if (top_logprobs > 0 && !logprobs) {
    return InvalidParameter("top_logprobs",
                            "when using `top_logprobs`, `logprobs` must be set to true.");
  }
  if (logprobs) request.num_logprobs = top_logprobs;
  return absl::OkStatus();
}

absl::Status ReadMaxTokens(const JsonFields& fields, ChatRequest& request) {
  std::optional<int64_t> max_tokens;
  RETURN_IF_ERROR(fields.Read("max_tokens", max_tokens));
  RETURN_IF_ERROR(fields.Read("max_completion_tokens", max_tokens));
  if (!max_tokens) return absl::OkStatus();
  const bool has_new_name = fields.Find("max_completion_tokens").has_value();
  RETURN_IF_ERROR(CheckMaxTokens(has_new_name ? "max_completion_tokens" : "max_tokens", *max_tokens,
                                 1, request.parameters));
  request.max_tokens = static_cast<uint32_t>(*max_tokens);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<uint32_t> ReadTopLogprobs(const JsonFields& fields, const ApiLimits& limits) {
  int64_t top_logprobs = 0;
  RETURN_IF_ERROR(fields.Read("top_logprobs", top_logprobs));
  if (top_logprobs < 0 || top_logprobs > limits.logprobs) {
    return InvalidParameter("top_logprobs",
                            absl::StrCat("top_logprobs must be in [0, ", limits.logprobs, "], got ",
                                         top_logprobs, "."));
  }
  return static_cast<uint32_t>(top_logprobs);
}

absl::StatusOr<std::optional<std::string>> ReadEffort(const JsonFields& fields,
                                                      std::string_view key, bool& thinking) {
  constexpr std::array<std::string_view, 7> kEfforts = {"none", "minimal", "low", "medium",
                                                        "high", "xhigh",   "max"};
  std::optional<std::string> effort;
  RETURN_IF_ERROR(fields.Read(key, effort));
  if (!effort) return effort;
  if (std::find(kEfforts.begin(), kEfforts.end(), *effort) == kEfforts.end()) {
    const std::string name = fields.NameOf(key);
    return InvalidParameter(name, absl::StrCat(name,
                                               " must be none, minimal, low, medium, high, xhigh "
                                               "or max, got '",
                                               *effort, "'."));
  }
  thinking = *effort != "none";
  return effort;
}

absl::StatusOr<ChatPrompt> ReadChatPrompt(const JsonFields& fields, const ApiLimits& limits) {
  ChatPrompt prompt;
  RETURN_IF_ERROR(ReadTemplateFields(fields, prompt.options));
  const std::optional<dom::element> value = fields.Find("messages");
  dom::array messages;
  if (!value || value->get(messages)) return fields.WrongType("messages", "a list of messages");
  if (messages.size() == 0) {
    return InvalidParameter("messages", "messages must have at least one message.");
  }
  if (messages.size() > limits.messages) {
    return InvalidParameter("messages", absl::StrCat("messages has ", messages.size(),
                                                     " messages, limit ", limits.messages, "."));
  }
  for (const dom::element element : messages) {
    ASSIGN_OR_RETURN(ChatMessage message,
                     ReadMessage(element, absl::StrCat("messages[", prompt.messages.size(), "]")));
    prompt.messages.push_back(std::move(message));
  }
  RETURN_IF_ERROR(ReadPromptEnd(fields, prompt));
  ASSIGN_OR_RETURN(prompt.options.tools, ReadTools(fields));
  RETURN_IF_ERROR(fields.Read("add_special_tokens", prompt.add_special_tokens));
  return prompt;
}

absl::Status AllowTools(const ToolChoice& choice, ChatRequest& request) {
  std::vector<ChatTool>& tools = request.prompt.options.tools;
  ASSIGN_OR_RETURN(request.tool_calls, ApplyToolChoice(choice, tools));
  for (const ChatTool& tool : tools) {
    if (choice.kind == ToolChoice::Kind::kRequired ||
        (choice.kind == ToolChoice::Kind::kNamed && choice.chosen.front().name == tool.name)) {
      request.required_tools.push_back(tool);
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<ChatRequest> ParseChatRequest(std::string_view body,
                                             const SamplingDefaults& defaults,
                                             const ApiLimits& limits) {
  ASSIGN_OR_RETURN(const JsonDocument document, JsonDocument::Parse(body, limits.json_depth));
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(document.root(), ""));
  ChatRequest request;
  RETURN_IF_ERROR(CheckUnreadFields(fields, ApiRoute::kChat));
  RETURN_IF_ERROR(fields.Read("model", request.model));
  ASSIGN_OR_RETURN(request.parameters, ReadGenerationParameters(fields, defaults, limits));
  ASSIGN_OR_RETURN(request.prompt, ReadChatPrompt(fields, limits));
  ASSIGN_OR_RETURN(const ToolChoice choice, ReadToolChoice(fields, FunctionName::kWrapped));
  RETURN_IF_ERROR(AllowTools(choice, request));
  // As OpenAI and vLLM have it.
  request.ends_as_call = choice.kind != ToolChoice::Kind::kNamed;
  RETURN_IF_ERROR(fields.Read("include_reasoning", request.include_reasoning));
  RETURN_IF_ERROR(ReadLogprobs(fields, limits, request));
  RETURN_IF_ERROR(ReadMaxTokens(fields, request));
  RETURN_IF_ERROR(fields.Read("echo", request.echo));
  return request;
}

}  // namespace fathom
