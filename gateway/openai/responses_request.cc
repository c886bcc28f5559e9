#include "gateway/openai/responses_request.h"

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "gateway/openai/errors.h"
#include "gateway/openai/json_writer.h"
#include "gateway/openai/structured_output.h"
#include "gateway/openai/unread_fields.h"

namespace fathom {
namespace {

namespace dom = simdjson::dom;

constexpr char kLogprobs[] = "message.output_text.logprobs";
// What else `include` may name. It is of the provider's tools, of images, or sealed: no response
// of this server has it.
constexpr std::array<const char*, 7> kNeverThere = {
    "code_interpreter_call.outputs", "computer_call_output.output.image_url",
    "file_search_call.results",      "message.input_image.image_url",
    "reasoning.encrypted_content",   "web_search_call.action.sources",
    "web_search_call.results"};

std::string Quoted(const std::optional<std::string>& text) {
  if (!text) return "null";
  JsonWriter json;
  json.String(*text);
  return json.Take();
}

// A string, or a list of parts with a text.
absl::StatusOr<std::string> ReadParts(const JsonFields& fields, std::string_view key) {
  const std::optional<dom::element> value = fields.Find(key);
  std::string_view text;
  if (value && !value->get(text)) return std::string(text);
  dom::array parts;
  if (!value || value->get(parts)) return fields.WrongType(key, "a string or a list of parts");
  std::string joined;
  for (const dom::element element : parts) {
    ASSIGN_OR_RETURN(const JsonFields part, JsonFields::Of(element, fields.NameOf(key)));
    std::optional<std::string> type, part_text;
    RETURN_IF_ERROR(part.Read("type", type));
    if (type != "input_text" && type != "output_text" && type != "text" &&
        type != "reasoning_text") {
      return InvalidParameter(part.NameOf("type"),
                              absl::StrCat("parts of type '", type.value_or(""),
                                           "' are not supported, expected 'input_text' or "
                                           "'output_text'"));
    }
    RETURN_IF_ERROR(part.Read("text", part_text));
    if (!part_text) return part.WrongType("text", "a string");
    if (!joined.empty()) joined += '\n';
    joined += *part_text;
  }
  return joined;
}

absl::StatusOr<ChatMessage> ReadMessage(const JsonFields& item) {
  std::optional<std::string> role;
  RETURN_IF_ERROR(item.Read("role", role));
  ChatMessage message;
  if (role == "system" || role == "developer") {
    message.role = ChatMessage::Role::kSystem;
  } else if (role == "assistant") {
    message.role = ChatMessage::Role::kAssistant;
  } else if (role == "user") {
    message.role = ChatMessage::Role::kUser;
  } else {
    return InvalidParameter(
        item.NameOf("role"),
        absl::StrCat(item.NameOf("role"), " must be user, assistant, system or developer, got '",
                     role.value_or(""), "'."));
  }
  ASSIGN_OR_RETURN(message.content, ReadParts(item, "content"));
  return message;
}

// Items as messages of a chat: thoughts, words and calls that follow each other are one message's.
class ItemReader {
 public:
  explicit ItemReader(std::vector<ChatMessage>& messages) : messages_(messages) {}

  absl::Status Read(dom::element element, std::string name) {
    ASSIGN_OR_RETURN(const JsonFields item, JsonFields::Of(element, std::move(name)));
    std::optional<std::string> type;
    RETURN_IF_ERROR(item.Read("type", type));
    if (!type || *type == "message") return ReadWords(item);
    if (*type == "function_call") return ReadCall(item);
    if (*type == "function_call_output") return ReadOutput(item);
    if (*type == "reasoning") return ReadThoughts(item);
    return InvalidParameter(
        item.NameOf("type"),
        absl::StrCat("items of type '", *type, "' are not supported, expected 'message', ",
                     "'function_call', 'function_call_output' or 'reasoning'"));
  }

 private:
  absl::Status ReadWords(const JsonFields& item) {
    ASSIGN_OR_RETURN(ChatMessage message, ReadMessage(item));
    if (message.role == ChatMessage::Role::kAssistant) {
      message.reasoning = std::exchange(thoughts_, "");
    }
    messages_.push_back(std::move(message));
    return absl::OkStatus();
  }

  absl::Status ReadCall(const JsonFields& item) {
    std::optional<std::string> id, name, arguments;
    RETURN_IF_ERROR(item.Read("call_id", id));
    RETURN_IF_ERROR(item.Read("name", name));
    RETURN_IF_ERROR(item.Read("arguments", arguments));
    if (!name) return item.WrongType("name", "a string");
    if (!arguments) return item.WrongType("arguments", "a string");
    if (messages_.empty() || messages_.back().role != ChatMessage::Role::kAssistant ||
        !thoughts_.empty()) {
      messages_.emplace_back();
      messages_.back().role = ChatMessage::Role::kAssistant;
      messages_.back().reasoning = std::exchange(thoughts_, "");
    }
    ChatToolCall call;
    call.id = id.value_or("");
    call.name = *std::move(name);
    call.arguments = *std::move(arguments);
    messages_.back().tool_calls.push_back(std::move(call));
    return absl::OkStatus();
  }

  absl::Status ReadOutput(const JsonFields& item) {
    std::optional<std::string> id;
    RETURN_IF_ERROR(item.Read("call_id", id));
    ChatMessage output;
    output.role = ChatMessage::Role::kTool;
    output.tool_call_id = id.value_or("");
    ASSIGN_OR_RETURN(output.content, ReadParts(item, "output"));
    messages_.push_back(std::move(output));
    return absl::OkStatus();
  }

  absl::Status ReadThoughts(const JsonFields& item) {
    if (!item.Find("content")) return absl::OkStatus();  // only a summary
    ASSIGN_OR_RETURN(thoughts_, ReadParts(item, "content"));
    return absl::OkStatus();
  }

  std::vector<ChatMessage>& messages_;
  std::string thoughts_;  // of the assistant's next message
};

absl::Status ReadInput(const JsonFields& fields, const ApiLimits& limits,
                       std::vector<ChatMessage>& messages) {
  const std::optional<dom::element> value = fields.Find("input");
  std::string_view text;
  if (value && !value->get(text)) {
    messages.emplace_back();
    messages.back().content = std::string(text);
    return absl::OkStatus();
  }
  dom::array items;
  if (!value || value->get(items)) return fields.WrongType("input", "a string or a list of items");
  if (items.size() == 0) return InvalidParameter("input", "input must have at least one item.");
  if (items.size() > limits.messages) {
    return InvalidParameter(
        "input", absl::StrCat("input has ", items.size(), " items, limit ", limits.messages, "."));
  }
  size_t index = 0;
  ItemReader reader(messages);
  for (const dom::element element : items) {
    RETURN_IF_ERROR(reader.Read(element, absl::StrCat("input[", index++, "]")));
  }
  if (messages.empty()) return InvalidParameter("input", "input must have at least one message.");
  return absl::OkStatus();
}

absl::Status ReadTextFormat(const JsonFields& fields, ResponsesRequest& request) {
  const std::optional<dom::element> text = fields.Find("text");
  if (!text) return absl::OkStatus();
  ASSIGN_OR_RETURN(const JsonFields options, JsonFields::Of(*text, "text"));
  std::optional<std::string> ignored;
  RETURN_IF_ERROR(options.Read("verbosity", ignored));
  const std::optional<dom::element> format = options.Find("format");
  if (!format) return absl::OkStatus();
  ASSIGN_OR_RETURN(const JsonFields named, JsonFields::Of(*format, "text.format"));
  request.text_format = simdjson::minify(*format);
  return AddTextFormat(named, request.chat.parameters.structured_output);
}

absl::Status ReadIncludedLogprobs(const JsonFields& fields, const ApiLimits& limits,
                                  ChatRequest& chat) {
  ASSIGN_OR_RETURN(const uint32_t top_logprobs, ReadTopLogprobs(fields, limits));
  std::vector<std::string> included;
  RETURN_IF_ERROR(fields.ReadStrings("include", included));
  for (const std::string& name : included) {
    if (name == kLogprobs) {
      chat.num_logprobs = top_logprobs;
    } else if (std::find(kNeverThere.begin(), kNeverThere.end(), name) == kNeverThere.end()) {
      return InvalidParameter(
          "include", absl::StrCat("include: '", name, "' is not known, expected ", kLogprobs,
                                  " or ", absl::StrJoin(kNeverThere, ", ")));
    }
  }
  if (top_logprobs > 0 && !chat.num_logprobs) {
    return InvalidParameter("top_logprobs",
                            absl::StrCat("when using top_logprobs, include must have ", kLogprobs));
  }
  return absl::OkStatus();
}

// What does not fit is refused, or as vLLM does it: of the prompt only its last tokens are read.
absl::Status ReadTruncation(const JsonFields& fields, ResponsesRequest& request) {
  std::optional<std::string> truncation;
  RETURN_IF_ERROR(fields.Read("truncation", truncation));
  if (!truncation || truncation == "disabled") return absl::OkStatus();
  if (truncation != "auto") {
    return InvalidParameter("truncation", absl::StrCat("truncation must be auto or disabled, got '",
                                                       *truncation, "'."));
  }
  request.truncation = Quoted(truncation);
  std::optional<int64_t>& num_tokens = request.chat.parameters.truncate_prompt_tokens;
  if (!num_tokens) num_tokens = -1;
  return absl::OkStatus();
}

absl::Status ReadEchoes(const JsonFields& fields, ResponsesRequest& request) {
  if (const std::optional<dom::element> metadata = fields.Find("metadata")) {
    request.metadata = simdjson::minify(*metadata);
  }
  std::optional<std::string> user, ignored;
  RETURN_IF_ERROR(fields.Read("user", user));
  request.user = Quoted(user);
  if (const std::optional<dom::element> value = fields.Find("reasoning")) {
    ASSIGN_OR_RETURN(const JsonFields reasoning, JsonFields::Of(*value, "reasoning"));
    RETURN_IF_ERROR(reasoning.Read("summary", ignored));
    ASSIGN_OR_RETURN(const std::optional<std::string> effort,
                     ReadEffort(reasoning, "effort", request.chat.prompt.options.thinking));
    request.reasoning_effort = Quoted(effort);
  }
  return absl::OkStatus();
}

absl::Status ReadToolUse(const JsonFields& fields, ResponsesRequest& request) {
  ChatRequest& chat = request.chat;
  ASSIGN_OR_RETURN(chat.prompt.options.tools, ReadBareTools(fields, "function", "parameters"));
  ASSIGN_OR_RETURN(const ToolChoice choice, ReadToolChoice(fields, FunctionName::kBare));
  RETURN_IF_ERROR(AllowTools(choice, chat));
  chat.call_id_prefix = "call_";
  request.parallel_tool_calls = choice.parallel;
  if (const auto tools = fields.Find("tools")) request.tools = simdjson::minify(*tools);
  if (const auto value = fields.Find("tool_choice")) request.tool_choice = simdjson::minify(*value);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ResponsesRequest> ParseResponsesRequest(std::string_view body,
                                                       const SamplingDefaults& defaults,
                                                       const ApiLimits& limits) {
  ASSIGN_OR_RETURN(const JsonDocument document, JsonDocument::Parse(body, limits.json_depth));
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(document.root(), ""));
  ResponsesRequest request;
  ChatRequest& chat = request.chat;
  RETURN_IF_ERROR(CheckUnreadFields(fields, ApiRoute::kResponses));
  RETURN_IF_ERROR(fields.Read("model", chat.model));
  ASSIGN_OR_RETURN(chat.parameters, ReadGenerationParameters(fields, defaults, limits));
  RETURN_IF_ERROR(ReadTextFormat(fields, request));
  RETURN_IF_ERROR(ReadTruncation(fields, request));
  chat.parameters.n = 1;
  chat.parameters.include_usage = true;  // the last event carries it
  std::optional<std::string> instructions;
  RETURN_IF_ERROR(fields.Read("instructions", instructions));
  request.instructions = Quoted(instructions);
  if (instructions) {
    chat.prompt.messages.emplace_back();
    chat.prompt.messages.back().role = ChatMessage::Role::kSystem;
    chat.prompt.messages.back().content = *std::move(instructions);
  }
  RETURN_IF_ERROR(ReadInput(fields, limits, chat.prompt.messages));
  RETURN_IF_ERROR(ReadIncludedLogprobs(fields, limits, chat));
  std::optional<int64_t> max_tokens;
  RETURN_IF_ERROR(fields.Read("max_output_tokens", max_tokens));
  if (max_tokens) {
    RETURN_IF_ERROR(CheckMaxTokens("max_output_tokens", *max_tokens, 1, chat.parameters));
    chat.max_tokens = static_cast<uint32_t>(*max_tokens);
  }
  RETURN_IF_ERROR(ReadEchoes(fields, request));
  RETURN_IF_ERROR(ReadToolUse(fields, request));
  if (chat.num_logprobs && chat.tool_calls != ToolCalls::kNone) {
    return InvalidParameter("include", absl::StrCat(kLogprobs, " is not supported with tools"));
  }
  return request;
}

}  // namespace fathom
