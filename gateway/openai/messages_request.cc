#include "gateway/openai/messages_request.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "gateway/openai/errors.h"
#include "gateway/openai/unread_fields.h"
#include "gateway/text/python_json.h"

namespace fathom {
namespace {

namespace dom = simdjson::dom;

absl::Status UnknownBlock(const JsonFields& block, const std::string& type) {
  return InvalidParameter(block.NameOf("type"),
                          absl::StrCat("blocks of type '", type, "' are not supported here"));
}

void AppendText(const std::string& text, std::optional<std::string>& content) {
  if (content) {
    absl::StrAppend(&*content, "\n", text);
  } else {
    content = text;
  }
}

absl::StatusOr<std::string> TextOf(const JsonFields& block) {
  std::optional<std::string> text;
  RETURN_IF_ERROR(block.Read("text", text));
  if (!text) return block.WrongType("text", "a string");
  return *std::move(text);
}

// A string, or a list of text blocks, as `system` and the content of a tool's result are.
absl::StatusOr<std::string> ReadText(const JsonFields& fields, std::string_view key) {
  const std::optional<dom::element> value = fields.Find(key);
  if (!value) return std::string();
  std::string_view text;
  if (!value->get(text)) return std::string(text);
  dom::array blocks;
  if (value->get(blocks)) return fields.WrongType(key, "a string or a list of text blocks");
  std::optional<std::string> joined;
  for (const dom::element element : blocks) {
    ASSIGN_OR_RETURN(const JsonFields block, JsonFields::Of(element, fields.NameOf(key)));
    std::optional<std::string> type;
    RETURN_IF_ERROR(block.Read("type", type));
    if (type != "text") return UnknownBlock(block, type.value_or(""));
    ASSIGN_OR_RETURN(const std::string block_text, TextOf(block));
    AppendText(block_text, joined);
  }
  return joined.value_or("");
}

absl::Status ReadToolUse(const JsonFields& block, ChatMessage& message) {
  ChatToolCall call;
  std::optional<std::string> id, name;
  RETURN_IF_ERROR(block.Read("id", id));
  RETURN_IF_ERROR(block.Read("name", name));
  if (!name) return block.WrongType("name", "a string");
  const std::optional<dom::element> input = block.Find("input");
  if (!input || !input->is_object()) return block.WrongType("input", "an object");
  call.id = id.value_or("");
  call.name = *std::move(name);
  call.arguments = PythonJson(*input);
  message.tool_calls.push_back(std::move(call));
  return absl::OkStatus();
}

// Results of tools come as blocks of a user's message; in a chat each is a message of its own, and
// they stand before what the user says.
absl::Status ReadBlock(const JsonFields& block, ChatMessage& message,
                       std::vector<ChatMessage>& messages) {
  std::optional<std::string> type;
  RETURN_IF_ERROR(block.Read("type", type));
  const bool by_user = message.role == ChatMessage::Role::kUser;
  if (type == "text") {
    ASSIGN_OR_RETURN(const std::string text, TextOf(block));
    AppendText(text, message.content);
    return absl::OkStatus();
  }
  if (type == "tool_result" && by_user) {
    std::optional<std::string> id;
    RETURN_IF_ERROR(block.Read("tool_use_id", id));
    ChatMessage result;
    result.role = ChatMessage::Role::kTool;
    result.tool_call_id = id.value_or("");
    ASSIGN_OR_RETURN(result.content, ReadText(block, "content"));
    messages.push_back(std::move(result));
    return absl::OkStatus();
  }
  if (type == "tool_use" && !by_user) return ReadToolUse(block, message);
  if (type == "thinking" && !by_user) {
    std::optional<std::string> thoughts;
    RETURN_IF_ERROR(block.Read("thinking", thoughts));
    message.reasoning += thoughts.value_or("");
    return absl::OkStatus();
  }
  if (type == "redacted_thinking" && !by_user) return absl::OkStatus();  // not for us to read
  return UnknownBlock(block, type.value_or(""));
}

absl::Status ReadMessage(dom::element element, std::string name,
                         std::vector<ChatMessage>& messages) {
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(element, std::move(name)));
  std::optional<std::string> role;
  RETURN_IF_ERROR(fields.Read("role", role));
  ChatMessage message;
  if (role == "assistant") {
    message.role = ChatMessage::Role::kAssistant;
  } else if (role != "user") {
    return InvalidParameter(fields.NameOf("role"),
                            absl::StrCat(fields.NameOf("role"), " must be user or assistant, got '",
                                         role.value_or(""), "'."));
  }
  const std::optional<dom::element> content = fields.Find("content");
  std::string_view text;
  dom::array blocks;
  if (content && !content->get(text)) {
    message.content = std::string(text);
  } else if (content && !content->get(blocks)) {
    for (const dom::element block_element : blocks) {
      ASSIGN_OR_RETURN(const JsonFields block,
                       JsonFields::Of(block_element, fields.NameOf("content")));
      RETURN_IF_ERROR(ReadBlock(block, message, messages));
    }
  } else {
    return fields.WrongType("content", "a string or a list of blocks");
  }
  if (message.content || !message.tool_calls.empty()) messages.push_back(std::move(message));
  return absl::OkStatus();
}

absl::Status ReadMessages(const JsonFields& fields, const ApiLimits& limits,
                          std::vector<ChatMessage>& messages) {
  ASSIGN_OR_RETURN(const std::string system, ReadText(fields, "system"));
  if (!system.empty()) {
    messages.emplace_back();
    messages.back().role = ChatMessage::Role::kSystem;
    messages.back().content = system;
  }
  const std::optional<dom::element> value = fields.Find("messages");
  dom::array list;
  if (!value || value->get(list)) return fields.WrongType("messages", "a list of messages");
  if (list.size() == 0) {
    return InvalidParameter("messages", "messages must have at least one message.");
  }
  if (list.size() > limits.messages) {
    return InvalidParameter("messages", absl::StrCat("messages has ", list.size(),
                                                     " messages, limit ", limits.messages, "."));
  }
  size_t index = 0;
  for (const dom::element element : list) {
    RETURN_IF_ERROR(ReadMessage(element, absl::StrCat("messages[", index++, "]"), messages));
  }
  return absl::OkStatus();
}

// {"type": "auto", "any", "tool" or "none", "name": …, "disable_parallel_tool_use": …}
absl::StatusOr<ToolChoice> ReadChoice(const JsonFields& fields) {
  ToolChoice choice;
  const std::optional<dom::element> value = fields.Find("tool_choice");
  if (!value) return choice;
  ASSIGN_OR_RETURN(const JsonFields said, JsonFields::Of(*value, "tool_choice"));
  std::optional<std::string> type, name;
  bool only_one = false;
  RETURN_IF_ERROR(said.Read("type", type));
  RETURN_IF_ERROR(said.Read("name", name));
  RETURN_IF_ERROR(said.Read("disable_parallel_tool_use", only_one));
  choice.parallel = !only_one;
  if (type == "auto") {
    choice.kind = ToolChoice::Kind::kAuto;
  } else if (type == "none") {
    choice.kind = ToolChoice::Kind::kNone;
  } else if (type == "any") {
    choice.kind = ToolChoice::Kind::kRequired;
  } else if (type == "tool" && name) {
    choice.kind = ToolChoice::Kind::kNamed;
    choice.chosen.push_back({*std::move(name), said.NameOf("name")});
  } else if (type == "tool") {
    return said.WrongType("name", "a string");
  } else {
    return InvalidParameter(said.NameOf("type"),
                            absl::StrCat("tool_choice.type must be auto, any, tool or none, got '",
                                         type.value_or(""), "'."));
  }
  return choice;
}

absl::Status ReadToolUse(const JsonFields& fields, ChatRequest& request) {
  ASSIGN_OR_RETURN(request.prompt.options.tools, ReadBareTools(fields, "custom", "input_schema"));
  ASSIGN_OR_RETURN(const ToolChoice choice, ReadChoice(fields));
  request.call_id_prefix = "toolu_";
  return AllowTools(choice, request);
}

// {"type": "enabled", "adaptive" or "disabled"}; how much it thinks is for the model to know.
absl::Status ReadThinking(const JsonFields& fields, bool& thinking) {
  const std::optional<dom::element> value = fields.Find("thinking");
  if (!value) return absl::OkStatus();
  ASSIGN_OR_RETURN(const JsonFields said, JsonFields::Of(*value, "thinking"));
  std::optional<std::string> type;
  RETURN_IF_ERROR(said.Read("type", type));
  if (!type) return said.WrongType("type", "a string");
  int64_t ignored = 0;
  RETURN_IF_ERROR(said.Read("budget_tokens", ignored));
  if (*type != "enabled" && *type != "adaptive" && *type != "disabled") {
    return InvalidParameter(
        said.NameOf("type"),
        absl::StrCat("thinking.type must be enabled, adaptive or disabled, got '", *type, "'."));
  }
  thinking = *type != "disabled";
  return absl::OkStatus();
}

// How hard to think is for the model to know, as above.
absl::Status ReadOutputConfig(const JsonFields& fields) {
  const std::optional<dom::element> value = fields.Find("output_config");
  if (!value) return absl::OkStatus();
  ASSIGN_OR_RETURN(const JsonFields config, JsonFields::Of(*value, "output_config"));
  if (config.Find("format")) return NotSupportedYet("output_config", "output_config.format");
  std::optional<std::string> ignored;
  return config.Read("effort", ignored);
}

absl::Status ReadPrompt(const JsonFields& fields, const ApiLimits& limits, ChatRequest& request) {
  RETURN_IF_ERROR(CheckUnreadFields(fields, ApiRoute::kMessages));
  RETURN_IF_ERROR(ReadOutputConfig(fields));
  RETURN_IF_ERROR(fields.Read("model", request.model));
  RETURN_IF_ERROR(ReadToolUse(fields, request));
  RETURN_IF_ERROR(ReadThinking(fields, request.prompt.options.thinking));
  RETURN_IF_ERROR(ReadMessages(fields, limits, request.prompt.messages));
  if (request.prompt.messages.empty()) {
    return InvalidParameter("messages", "messages must have at least one message with content.");
  }
  // The assistant's last words are continued.
  if (request.prompt.messages.back().role == ChatMessage::Role::kAssistant) {
    request.prompt.options.add_generation_prompt = false;
    request.prompt.options.continue_final_message = true;
  }
  return absl::OkStatus();
}

absl::Status ReadStopSequences(const JsonFields& fields, const ApiLimits& limits,
                               std::vector<std::string>& stop) {
  RETURN_IF_ERROR(fields.ReadStrings("stop_sequences", stop));
  return CheckStopStrings("stop_sequences", stop, limits);
}

}  // namespace

absl::StatusOr<ChatRequest> ParseMessagesRequest(std::string_view body,
                                                 const SamplingDefaults& defaults,
                                                 const ApiLimits& limits) {
  ASSIGN_OR_RETURN(const JsonDocument document, JsonDocument::Parse(body, limits.json_depth));
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(document.root(), ""));
  ChatRequest request;
  RETURN_IF_ERROR(ReadPrompt(fields, limits, request));
  ASSIGN_OR_RETURN(request.parameters, ReadGenerationParameters(fields, defaults, limits));
  request.parameters.n = 1;
  request.parameters.include_usage = true;  // the last events carry it
  RETURN_IF_ERROR(ReadStopSequences(fields, limits, request.parameters.stop));
  std::optional<int64_t> max_tokens;
  RETURN_IF_ERROR(fields.Read("max_tokens", max_tokens));
  if (!max_tokens) return fields.WrongType("max_tokens", "an integer");
  RETURN_IF_ERROR(CheckMaxTokens("max_tokens", *max_tokens, 1, request.parameters));
  request.max_tokens = static_cast<uint32_t>(*max_tokens);
  return request;
}

absl::StatusOr<ChatRequest> ParseCountTokensRequest(std::string_view body,
                                                    const ApiLimits& limits) {
  ASSIGN_OR_RETURN(const JsonDocument document, JsonDocument::Parse(body, limits.json_depth));
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(document.root(), ""));
  ChatRequest request;
  RETURN_IF_ERROR(ReadPrompt(fields, limits, request));
  return request;
}

}  // namespace fathom
