#include "gateway/text/chat_encoding.h"

#include <algorithm>
#include <iterator>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace fathom {
namespace {

constexpr char kUser[] = "<｜User｜>";
constexpr char kAssistant[] = "<｜Assistant｜>";
constexpr char kCallsBegin[] = "<｜tool▁calls▁begin｜>";
constexpr char kCallsEnd[] = "<｜tool▁calls▁end｜>";
constexpr char kCallBegin[] = "<｜tool▁call▁begin｜>";
constexpr char kCallEnd[] = "<｜tool▁call▁end｜>";
constexpr char kSeparator[] = "<｜tool▁sep｜>";
constexpr char kOutputsBegin[] = "<｜tool▁outputs▁begin｜>";
constexpr char kOutputsEnd[] = "<｜tool▁outputs▁end｜>";
constexpr char kOutputBegin[] = "<｜tool▁output▁begin｜>";
constexpr char kOutputEnd[] = "<｜tool▁output▁end｜>";

constexpr const char* kToolTokens[] = {kCallsBegin, kCallsEnd,    kCallBegin,
                                       kCallEnd,    kSeparator,   kOutputsBegin,
                                       kOutputsEnd, kOutputBegin, kOutputEnd};

using Role = ChatMessage::Role;

std::string_view NameOf(Role role) {
  switch (role) {
    case Role::kSystem:
      return "system";
    case Role::kUser:
      return "user";
    case Role::kAssistant:
      return "assistant";
    case Role::kTool:
      return "tool";
  }
  return "unknown";
}

std::string JoinSystemMessages(absl::Span<const ChatMessage> messages) {
  std::string joined;
  bool is_first = true;
  for (const ChatMessage& message : messages) {
    if (message.role != Role::kSystem) continue;
    absl::StrAppend(&joined, is_first ? "" : "\n\n", *message.content);
    is_first = false;
  }
  return joined;
}

std::string RenderToolCall(const ChatToolCall& call) {
  return absl::StrCat(kCallBegin, call.type, kSeparator, call.name, "\n```json\n", call.arguments,
                      "\n```", kCallEnd);
}

void AppendToolCalls(const std::vector<ChatToolCall>& calls, std::string& text) {
  for (size_t i = 0; i < calls.size(); ++i) {
    absl::StrAppend(&text, i == 0 ? kCallsBegin : "\n", RenderToolCall(calls[i]));
  }
  if (!calls.empty()) absl::StrAppend(&text, kCallsEnd);
}

// The outputs of one round stand together between kOutputsBegin and kOutputsEnd.
void AppendToolOutput(const std::string& content, bool is_first, std::string& text) {
  absl::StrAppend(&text, is_first ? kOutputsBegin : "\n", kOutputBegin, content, kOutputEnd);
}

}  // namespace

absl::StatusOr<ChatEncoder> ChatEncoder::Create(const Tokenizer& tokenizer) {
  if (!tokenizer.bos().has_value() || !tokenizer.eos().has_value()) {
    return absl::FailedPreconditionError(
        "tokenizer_config.json names no bos_token or no eos_token, which DeepSeek's chat layouts "
        "need");
  }
  for (const char* token : {kUser, kAssistant}) {
    if (tokenizer.FindAddedToken(token).has_value()) continue;
    return absl::FailedPreconditionError(absl::StrCat(
        "the tokenizer has no token ", token, ": the model does not use DeepSeek's chat layout"));
  }
  const std::string_view chat_template = tokenizer.chat_template();
  const auto mentions = [&](std::string_view text) {
    return chat_template.find(text) != std::string_view::npos;
  };
  if (mentions("think>") || mentions("DSML")) {
    return absl::FailedPreconditionError(
        "the chat_template handles <think>, supported are the layouts of DeepSeek-V3 and V3-0324");
  }

  ChatEncoder encoder;
  // The variables by which the two official templates differ.
  const bool is_v3 = mentions("is_output_first") && !mentions("is_last_user");
  encoder.layout_ = is_v3 ? Layout::kV3 : Layout::kV3_0324;
  encoder.bos_ = std::string(tokenizer.BytesOf(*tokenizer.bos()));
  encoder.eos_ = std::string(tokenizer.BytesOf(*tokenizer.eos()));
  encoder.has_tool_tokens_ =
      std::all_of(std::begin(kToolTokens), std::end(kToolTokens),
                  [&](const char* token) { return tokenizer.FindAddedToken(token).has_value(); });
  return encoder;
}

absl::Status ChatEncoder::Validate(absl::Span<const ChatMessage> messages,
                                   const ChatOptions& options) const {
  if (messages.empty()) return absl::InvalidArgumentError("messages must not be empty");
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    const std::string where =
        absl::StrCat("messages[", i, "] (", std::string(NameOf(message.role)), ")");
    const bool calls_tools = !message.tool_calls.empty();
    if (calls_tools && message.role != Role::kAssistant) {
      return absl::InvalidArgumentError(absl::StrCat(where, " has tool_calls"));
    }
    if (!message.content.has_value() && !calls_tools) {
      return absl::InvalidArgumentError(absl::StrCat(where, " has no content"));
    }
    if ((calls_tools || message.role == Role::kTool) && !has_tool_tokens_) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": the model's tokenizer has no tokens for tool calls"));
    }
  }
  if (!options.continue_final_message) return absl::OkStatus();
  if (options.add_generation_prompt) {
    return absl::InvalidArgumentError(
        "Cannot set both `continue_final_message` and `add_generation_prompt` to True.");
  }
  const ChatMessage& last = messages.back();
  if (!last.tool_calls.empty() || (last.role != Role::kUser && last.role != Role::kAssistant)) {
    return absl::InvalidArgumentError(
        "continue_final_message needs a last message by user or assistant without tool_calls");
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ChatEncoder::Encode(absl::Span<const ChatMessage> messages,
                                                const ChatOptions& options) const {
  RETURN_IF_ERROR(Validate(messages, options));
  return layout_ == Layout::kV3 ? EncodeV3(messages, options) : EncodeV3_0324(messages, options);
}

std::string ChatEncoder::EncodeV3(absl::Span<const ChatMessage> messages,
                                  const ChatOptions& options) const {
  std::string text = absl::StrCat(bos_, JoinSystemMessages(messages));
  bool is_after_output = false;
  bool is_first_call = true;  // of the conversation, as in the template; so are outputs
  bool is_first_output = true;
  for (const ChatMessage& message : messages) {
    const std::string content = message.content.value_or("");
    if (message.role == Role::kUser) {
      is_after_output = false;
      absl::StrAppend(&text, kUser, content);
    } else if (message.role == Role::kTool) {
      is_after_output = true;
      AppendToolOutput(content, is_first_output, text);
      is_first_output = false;
    } else if (message.role == Role::kAssistant && message.tool_calls.empty()) {
      absl::StrAppend(&text, is_after_output ? kOutputsEnd : kAssistant, content);
      is_after_output = false;
      if (!options.continue_final_message || &message != &messages.back()) {
        absl::StrAppend(&text, eos_);
      }
    } else if (message.role == Role::kAssistant && !content.empty()) {
      absl::StrAppend(&text, is_after_output ? kOutputsEnd : kAssistant, content);
      is_after_output = false;
      AppendToolCalls(message.tool_calls, text);
      absl::StrAppend(&text, eos_);
    } else if (message.role == Role::kAssistant) {
      is_after_output = false;
      for (const ChatToolCall& call : message.tool_calls) {
        if (is_first_call) {
          absl::StrAppend(&text, kAssistant, kCallsBegin, RenderToolCall(call));
        } else {
          absl::StrAppend(&text, "\n", RenderToolCall(call), kCallsEnd, eos_);
        }
        is_first_call = false;
      }
    }
  }
  if (is_after_output) {
    absl::StrAppend(&text, kOutputsEnd);
  } else if (options.add_generation_prompt) {
    absl::StrAppend(&text, kAssistant);
  }
  return text;
}

std::string ChatEncoder::EncodeV3_0324(absl::Span<const ChatMessage> messages,
                                       const ChatOptions& options) const {
  std::string text = absl::StrCat(bos_, JoinSystemMessages(messages));
  bool is_after_output = false;
  bool is_after_user = false;
  bool is_first_output = true;  // since tools were last called
  for (const ChatMessage& message : messages) {
    const bool is_open = options.continue_final_message && &message == &messages.back();
    const std::string content = message.content.value_or("");
    if (message.role == Role::kUser) {
      absl::StrAppend(&text, kUser, content, is_open ? "" : kAssistant);
      is_after_output = false;
      is_after_user = true;
    } else if (message.role == Role::kTool) {
      AppendToolOutput(content, is_first_output, text);
      is_first_output = false;
      is_after_output = true;
      is_after_user = false;
    } else if (message.role == Role::kAssistant) {
      absl::StrAppend(&text, is_after_output ? kOutputsEnd : "", content);
      is_after_output = false;
      is_after_user = false;
      AppendToolCalls(message.tool_calls, text);
      if (!message.tool_calls.empty()) is_first_output = true;
      absl::StrAppend(&text, is_open ? "" : eos_);
    }
  }
  if (is_after_output) {
    absl::StrAppend(&text, kOutputsEnd);
  } else if (options.add_generation_prompt && !is_after_user) {
    absl::StrAppend(&text, kAssistant);
  }
  return text;
}

}  // namespace fathom
