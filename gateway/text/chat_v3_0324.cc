// DeepSeek-V3-0324 and DeepSeek-R1-0528.
//
//   BOS system <｜User｜>user<｜Assistant｜>assistant EOS <｜User｜>user<｜Assistant｜>
//
// R1-0528 cuts thoughts off answers and begins to think of its own accord. Its template fails where
// an assistant that calls tools has null content; here that is "".
// Source: chat_template in tokenizer_config.json of deepseek-ai/DeepSeek-V3-0324, -R1-0528.
#include <string>

#include "gateway/text/chat_layout.h"
#include "gateway/text/concat.h"
#include "gateway/text/deepseek_markers.h"

namespace fathom {
namespace {

using namespace deepseek;  // NOLINT
using Role = ChatMessage::Role;

enum class Thoughts { kKeep, kStrip };

std::string Render(absl::Span<const ChatMessage> messages, const ChatOptions& options,
                   Thoughts thoughts) {
  std::string text = Concat({kBos, SystemPrompt(messages, options, kFormOfACallWithType)});
  bool is_after_output = false;
  bool is_after_user = false;
  bool is_first_output = true;  // since tools were last called
  for (const ChatMessage& message : messages) {
    const bool is_open = IsLeftOpen(message, messages, options);
    const std::string content = message.content.value_or("");
    if (message.role == Role::kUser) {
      Append(text, {kUser, content, is_open ? "" : kAssistant});
      is_after_output = false;
      is_after_user = true;
    } else if (message.role == Role::kTool) {
      Append(text, {is_first_output ? kOutputsBegin : "\n", kOutputBegin, content, kOutputEnd});
      is_first_output = false;
      is_after_output = true;
      is_after_user = false;
    } else if (message.role == Role::kAssistant) {
      Append(text, {is_after_output ? kOutputsEnd : "",
                    thoughts == Thoughts::kStrip ? AfterThinking(content) : content});
      is_after_output = false;
      is_after_user = false;
      for (const ChatToolCall& call : message.tool_calls) {
        const bool is_first = &call == &message.tool_calls.front();
        Append(text, {is_first ? kCallsBegin : "\n", CallWithType(call)});
      }
      if (!message.tool_calls.empty()) {
        Append(text, {kCallsEnd});
        is_first_output = true;
      }
      Append(text, {is_open ? "" : kEos});
    }
  }
  if (is_after_output) {
    Append(text, {kOutputsEnd});
  } else if (options.add_generation_prompt && !is_after_user) {
    Append(text, {kAssistant});
  }
  return text;
}

absl::StatusOr<std::string> RenderV3_0324(absl::Span<const ChatMessage> messages,
                                          const ChatOptions& options) {
  return Render(messages, options, Thoughts::kKeep);
}

absl::StatusOr<std::string> RenderR1_0528(absl::Span<const ChatMessage> messages,
                                          const ChatOptions& options) {
  return Render(messages, options, Thoughts::kStrip);
}

bool NeverThinks(absl::Span<const ChatMessage>, const ChatOptions&) { return false; }

bool ThinksIfLeftThinking(absl::Span<const ChatMessage> messages, const ChatOptions& options) {
  return options.continue_final_message && IsLeftThinking(messages.back());
}

}  // namespace

const ChatLayout kChatV3_0324 = {
    .name = "deepseek_v3_0324",
    .what = "DeepSeek-V3-0324",
    .tokens = kTokens,
    .tool_tokens = kToolTokens,
    .syntax = {ToolSyntax::kV3, ThinkSyntax::kNone},
    .render = RenderV3_0324,
    .ends_in_thinking = NeverThinks,
};

const ChatLayout kChatR1_0528 = {
    .name = "deepseek_r1_0528",
    .what = "DeepSeek-R1-0528",
    .tokens = kThinkingTokens,
    .tool_tokens = kToolTokens,
    .syntax = {ToolSyntax::kV3, ThinkSyntax::kMayThink},
    .render = RenderR1_0528,
    .ends_in_thinking = ThinksIfLeftThinking,
};

}  // namespace fathom
