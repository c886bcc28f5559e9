// DeepSeek-R1, in the template of its later revisions.
//
//   BOS system <｜User｜>user<｜Assistant｜>assistant EOS … <｜User｜>user<｜Assistant｜><think>\n
//
// Thoughts are cut off answers, but not off one that follows tool outputs. Only the first call and
// the first output of the conversation get the markers that begin a list.
// Source: chat_template in tokenizer_config.json of deepseek-ai/DeepSeek-R1.
#include <string>

#include "gateway/text/chat_layout.h"
#include "gateway/text/concat.h"
#include "gateway/text/deepseek_markers.h"

namespace fathom {
namespace {

using namespace deepseek;  // NOLINT
using Role = ChatMessage::Role;

absl::StatusOr<std::string> Render(absl::Span<const ChatMessage> messages,
                                   const ChatOptions& options) {
  std::string text = Concat({kBos, SystemPrompt(messages, options, kFormOfACallWithType)});
  bool is_after_output = false;
  bool is_first_call = true;
  bool is_first_output = true;
  for (const ChatMessage& message : messages) {
    const std::string content = message.content.value_or("");
    if (message.role == Role::kUser) {
      is_after_output = false;
      Append(text, {kUser, content});
    } else if (message.role == Role::kTool) {
      is_after_output = true;
      Append(text, {is_first_output ? kOutputsBegin : "", kOutputBegin, content, kOutputEnd});
      is_first_output = false;
    } else if (message.role == Role::kAssistant && !message.tool_calls.empty()) {
      is_after_output = false;
      for (const ChatToolCall& call : message.tool_calls) {
        if (is_first_call) {
          Append(text, {kAssistant, content, kCallsBegin, CallWithType(call)});
        } else {
          Append(text, {"\n", CallWithType(call)});
        }
        is_first_call = false;
      }
      Append(text, {kCallsEnd, kEos});
    } else if (message.role == Role::kAssistant) {
      if (is_after_output) {
        Append(text, {kOutputsEnd, content});
      } else {
        Append(text, {kAssistant, AfterThinking(content)});
      }
      is_after_output = false;
      Append(text, {IsLeftOpen(message, messages, options) ? "" : kEos});
    }
  }
  if (is_after_output) {
    Append(text, {kOutputsEnd});
  } else if (options.add_generation_prompt) {
    Append(text, {kAssistant, kThink, "\n"});
  }
  return text;
}

bool EndsInThinking(absl::Span<const ChatMessage> messages, const ChatOptions& options) {
  if (options.continue_final_message) return IsLeftThinking(messages.back());
  return options.add_generation_prompt && messages.back().role != Role::kTool;
}

}  // namespace

const ChatLayout kChatR1 = {
    .name = "deepseek_r1",
    .what = "DeepSeek-R1",
    .tokens = kThinkingTokens,
    .tool_tokens = kToolTokens,
    .syntax = {ToolSyntax::kV3, ThinkSyntax::kMayThink},
    .render = Render,
    .ends_in_thinking = EndsInThinking,
};

}  // namespace fathom
