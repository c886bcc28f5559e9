// DeepSeek-V3 (December 2024) and the first template of DeepSeek-R1, which grew out of it.
//
//   BOS system <｜User｜>user<｜Assistant｜>assistant EOS <｜User｜> …
//
// A single tool call is left unclosed, and whether a call or an output is the first is asked of the
// whole conversation. The templates drop the tool calls of a message whose content is not null;
// here "" counts as null, and other content is printed with its calls, as V3-0324 does.
// Source: chat_template in tokenizer_config.json of deepseek-ai/DeepSeek-V3 and of
// deepseek-ai/DeepSeek-R1 (January 2025; R1's distillations have it still).
#include <string>

#include "gateway/text/chat_layout.h"
#include "gateway/text/concat.h"
#include "gateway/text/deepseek_markers.h"

namespace fathom {
namespace {

using namespace deepseek;  // NOLINT
using Role = ChatMessage::Role;

// How the two differ.
struct Variant {
  bool strips_thinking;
  std::string_view generation_prompt;
};

void AppendAnswer(const ChatMessage& message, const Variant& variant, bool is_after_output,
                  std::string& text) {
  const std::string& content = *message.content;
  if (is_after_output) {
    Append(text, {kOutputsEnd, content});
  } else {
    Append(text, {kAssistant, variant.strips_thinking ? AfterThinking(content) : content});
  }
}

std::string Render(std::string_view system_prompt, absl::Span<const ChatMessage> messages,
                   const ChatOptions& options, const Variant& variant) {
  std::string text = Concat({kBos, system_prompt});
  bool is_after_output = false;
  bool is_first_call = true;
  bool is_first_output = true;
  for (const ChatMessage& message : messages) {
    const bool has_content = message.content.has_value() && !message.content->empty();
    if (message.role == Role::kUser) {
      is_after_output = false;
      Append(text, {kUser, *message.content});
    } else if (message.role == Role::kTool) {
      is_after_output = true;
      Append(text,
             {is_first_output ? kOutputsBegin : "\n", kOutputBegin, *message.content, kOutputEnd});
      is_first_output = false;
    } else if (message.role == Role::kAssistant && message.tool_calls.empty()) {
      AppendAnswer(message, variant, is_after_output, text);
      is_after_output = false;
      Append(text, {IsLeftOpen(message, messages, options) ? "" : kEos});
    } else if (message.role == Role::kAssistant && has_content) {
      AppendAnswer(message, variant, is_after_output, text);
      is_after_output = false;
      for (const ChatToolCall& call : message.tool_calls) {
        const bool is_first = &call == &message.tool_calls.front();
        Append(text, {is_first ? kCallsBegin : "\n", CallWithType(call)});
      }
      Append(text, {kCallsEnd, kEos});
    } else if (message.role == Role::kAssistant) {
      is_after_output = false;
      for (const ChatToolCall& call : message.tool_calls) {
        if (is_first_call) {
          Append(text, {kAssistant, kCallsBegin, CallWithType(call)});
        } else {
          Append(text, {"\n", CallWithType(call), kCallsEnd, kEos});
        }
        is_first_call = false;
      }
    }
  }
  if (is_after_output) {
    Append(text, {kOutputsEnd});
  } else if (options.add_generation_prompt) {
    Append(text, {variant.generation_prompt});
  }
  return text;
}

absl::StatusOr<std::string> RenderV3(absl::Span<const ChatMessage> messages,
                                     const ChatOptions& options) {
  return Render(SystemPrompt(messages, options, kFormOfACallWithType), messages, options,
                {.strips_thinking = false, .generation_prompt = kAssistant});
}

// Only the last system message counts.
absl::StatusOr<std::string> RenderR1(absl::Span<const ChatMessage> messages,
                                     const ChatOptions& options) {
  size_t first = 0;
  for (size_t i = 0; i < messages.size(); ++i) {
    if (messages[i].role == Role::kSystem) first = i;
  }
  return Render(SystemPrompt(messages.subspan(first), options, kFormOfACallWithType), messages,
                options,
                {.strips_thinking = true, .generation_prompt = "<｜Assistant｜><think>\n"});
}

bool NeverThinks(absl::Span<const ChatMessage>, const ChatOptions&) { return false; }

bool ThinksUnlessAfterOutputs(absl::Span<const ChatMessage> messages, const ChatOptions& options) {
  if (options.continue_final_message) return IsLeftThinking(messages.back());
  return options.add_generation_prompt && messages.back().role != Role::kTool;
}

}  // namespace

const ChatLayout kChatV3 = {
    .name = "deepseek_v3",
    .what = "DeepSeek-V3",
    .tokens = kTokens,
    .tool_tokens = kToolTokens,
    .syntax = {ToolSyntax::kV3, ThinkSyntax::kNone},
    .render = RenderV3,
    .ends_in_thinking = NeverThinks,
};

const ChatLayout kChatR1First = {
    .name = "deepseek_r1_first",
    .what = "the first DeepSeek-R1 and its distillations",
    .tokens = kThinkingTokens,
    .tool_tokens = kToolTokens,
    .syntax = {ToolSyntax::kV3, ThinkSyntax::kMayThink},
    .render = RenderR1,
    .ends_in_thinking = ThinksUnlessAfterOutputs,
};

}  // namespace fathom
