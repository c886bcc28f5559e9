// DeepSeek-V3.1 and V3.1-Terminus.
//
//   BOS system <｜User｜>user<｜Assistant｜></think>assistant EOS … <｜User｜>user<｜Assistant｜>
//
// and then <think> or </think>. Tool outputs follow each other without more, and so does what the
// model writes after them. Thoughts are cut off answers that do not follow tool outputs. The
// template prints no tools; they are told of as the model card says, at the end of the system
// prompt.
// Source: chat_template in tokenizer_config.json and the card of deepseek-ai/DeepSeek-V3.1.
#include <string>

#include "gateway/text/chat_layout.h"
#include "gateway/text/concat.h"
#include "gateway/text/deepseek_markers.h"

namespace fathom {
namespace {

using namespace deepseek;  // NOLINT
using Role = ChatMessage::Role;

constexpr std::string_view kFormOfACall =
    "<｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>";

// What follows the first </think>.
std::string_view AfterFirstThinking(std::string_view content) {
  const size_t end = content.find(kThinkEnd);
  return end == std::string_view::npos ? content : content.substr(end + kThinkEnd.size());
}

void AppendToolCalls(const ChatMessage& message, std::string& text) {
  Append(text, {message.content.value_or(""), kCallsBegin});
  for (const ChatToolCall& call : message.tool_calls) {
    Append(text, {kCallBegin, call.name, kSeparator, call.arguments, kCallEnd});
  }
  Append(text, {kCallsEnd, kEos});
}

absl::StatusOr<std::string> Render(absl::Span<const ChatMessage> messages,
                                   const ChatOptions& options) {
  std::string text = Concat({kBos, SystemPrompt(messages, options, kFormOfACall)});
  bool is_after_output = false;
  bool is_after_user = false;
  for (const ChatMessage& message : messages) {
    if (message.role == Role::kUser) {
      Append(text, {kUser, *message.content});
      is_after_output = false;
      is_after_user = true;
    } else if (message.role == Role::kTool) {
      Append(text, {kOutputBegin, *message.content, kOutputEnd});
      is_after_output = true;
      is_after_user = false;
    } else if (message.role == Role::kAssistant && !message.tool_calls.empty()) {
      if (is_after_user) Append(text, {kAssistant, kThinkEnd});
      AppendToolCalls(message, text);
      is_after_output = false;
      is_after_user = false;
    } else if (message.role == Role::kAssistant) {
      if (is_after_user) {
        const bool thinks_on = message.prefix && options.thinking;
        Append(text, {kAssistant, thinks_on ? kThink : kThinkEnd});
      }
      Append(text, {is_after_output ? *message.content : AfterFirstThinking(*message.content)});
      Append(text, {IsLeftOpen(message, messages, options) ? "" : kEos});
      is_after_output = false;
      is_after_user = false;
    }
  }
  if (options.add_generation_prompt && is_after_user) {
    Append(text, {kAssistant, options.thinking ? kThink : kThinkEnd});
  }
  return text;
}

bool EndsInThinking(absl::Span<const ChatMessage> messages, const ChatOptions& options) {
  // System messages stand elsewhere in the text: the last of the others is what it ends with.
  Role last = Role::kSystem;
  Role before = Role::kSystem;
  for (const ChatMessage& message : messages) {
    if (message.role == Role::kSystem) continue;
    before = last;
    last = message.role;
  }
  if (!options.continue_final_message) {
    return options.thinking && options.add_generation_prompt && last == Role::kUser;
  }
  if (last != Role::kAssistant) return false;
  if (before == Role::kUser && messages.back().prefix && options.thinking) return true;
  return IsLeftThinking(messages.back());
}

}  // namespace

const ChatLayout kChatV31 = {
    .name = "deepseek_v31",
    .what = "DeepSeek-V3.1 and V3.2-Exp",
    .tokens = kThinkingTokens,
    .tool_tokens = kToolTokens,
    .syntax = {ToolSyntax::kV31, ThinkSyntax::kThinkTags},
    .render = Render,
    .ends_in_thinking = EndsInThinking,
};

}  // namespace fathom
