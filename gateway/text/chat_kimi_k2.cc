// Kimi-K2 of Moonshot AI, which shares DeepSeek-V3's architecture, and Kimi-K2-Thinking.
//
//   <|im_system|>system<|im_middle|>system<|im_end|><|im_user|>user<|im_middle|>user<|im_end|>
//   <|im_assistant|>assistant<|im_middle|>assistant<|im_end|> …
//
// on one line. A message's name replaces its role in the text. Thinking prints the thoughts of the
// answers behind the last one that called no tools, and empty ones before.
// A call without an id gets functions.NAME:NUMBER, which is what the model itself writes.
// Source: chat_template of moonshotai/Kimi-K2-Instruct-0905 and moonshotai/Kimi-K2-Thinking.
#include <string>

#include "gateway/text/chat_layout.h"
#include "gateway/text/concat.h"

namespace fathom {
namespace {

using Role = ChatMessage::Role;

constexpr std::string_view kEnd = "<|im_end|>";
constexpr std::string_view kTokens[] = {"<|im_system|>", "<|im_user|>", "<|im_assistant|>",
                                        "<|im_middle|>", kEnd};
constexpr std::string_view kThinkingTokens[] = {"<|im_system|>", "<|im_user|>", "<|im_assistant|>",
                                                "<|im_middle|>", kEnd,          "<think>",
                                                "</think>"};
constexpr std::string_view kToolTokens[] = {"<|tool_calls_section_begin|>",
                                            "<|tool_calls_section_end|>", "<|tool_call_begin|>",
                                            "<|tool_call_argument_begin|>", "<|tool_call_end|>"};
constexpr std::string_view kDefaultSystemPrompt =
    "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI."
    "<|im_end|>";

std::string Head(const ChatMessage& message) {
  std::string_view marker = "<|im_system|>";
  std::string_view role = "system";
  if (message.role == Role::kUser) marker = "<|im_user|>", role = "user";
  if (message.role == Role::kAssistant) marker = "<|im_assistant|>", role = "assistant";
  if (message.role == Role::kTool) role = "tool";
  return Concat(
      {marker, message.name.empty() ? role : std::string_view(message.name), "<|im_middle|>"});
}

void AppendToolCalls(const ChatMessage& message, std::string& text) {
  Append(text, {"<|tool_calls_section_begin|>"});
  for (size_t i = 0; i < message.tool_calls.size(); ++i) {
    const ChatToolCall& call = message.tool_calls[i];
    const std::string id =
        call.id.empty() ? Concat({"functions.", call.name, ":", std::to_string(i)}) : call.id;
    Append(text, {"<|tool_call_begin|>", id, "<|tool_call_argument_begin|>", call.arguments,
                  "<|tool_call_end|>"});
  }
  Append(text, {"<|tool_calls_section_end|>"});
}

bool HasTools(const ChatOptions& options) { return !options.tools.empty(); }

void AppendTools(const ChatOptions& options, std::string& text) {
  if (!HasTools(options)) return;
  Append(text, {"<|im_system|>tool_declare<|im_middle|>["});
  for (const ChatTool& tool : options.tools) {
    Append(text, {&tool == &options.tools.front() ? "" : ", ", tool.json});
  }
  Append(text, {"]", kEnd});
}

// Which messages print their thoughts: none, or those from an index on.
std::string Render(absl::Span<const ChatMessage> messages, const ChatOptions& options,
                   bool has_thoughts, std::string_view before_tool_output) {
  size_t first_with_thoughts = 0;
  for (size_t i = 0; i < messages.size(); ++i) {
    const bool answers = messages[i].role == Role::kAssistant && messages[i].tool_calls.empty();
    if (answers) first_with_thoughts = i + 1;
  }
  std::string text;
  AppendTools(options, text);
  if (messages.front().role != Role::kSystem) text += kDefaultSystemPrompt;
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    text += Head(message);
    if (message.role == Role::kAssistant && has_thoughts) {
      Append(text, {"<think>", i < first_with_thoughts ? std::string_view() : message.reasoning,
                    "</think>"});
    }
    if (message.role == Role::kTool) {
      Append(text, {"## Return of ", message.tool_call_id, before_tool_output});
    }
    text += message.content.value_or("");
    if (!message.tool_calls.empty()) AppendToolCalls(message, text);
    const bool is_open = options.continue_final_message && i + 1 == messages.size();
    if (!is_open) text += kEnd;
  }
  if (options.add_generation_prompt) {
    Append(text, {"<|im_assistant|>assistant<|im_middle|>"});
  }
  return text;
}

absl::StatusOr<std::string> RenderInstruct(absl::Span<const ChatMessage> messages,
                                           const ChatOptions& options) {
  return Render(messages, options, false, "\n    ");
}

absl::StatusOr<std::string> RenderThinking(absl::Span<const ChatMessage> messages,
                                           const ChatOptions& options) {
  return Render(messages, options, true, "\n");
}

// The prompt never begins a thought: the model does, or the text of a message left open closed it.
bool NeverThinks(absl::Span<const ChatMessage>, const ChatOptions&) { return false; }

}  // namespace

const ChatLayout kChatKimiK2 = {
    .name = "kimi_k2",
    .what = "Kimi-K2-Instruct",
    .tokens = kTokens,
    .tool_tokens = kToolTokens,
    .syntax = {ToolSyntax::kKimiK2, ThinkSyntax::kNone},
    .render = RenderInstruct,
    .ends_in_thinking = NeverThinks,
};

const ChatLayout kChatKimiK2Thinking = {
    .name = "kimi_k2_thinking",
    .what = "Kimi-K2-Thinking",
    .tokens = kThinkingTokens,
    .tool_tokens = kToolTokens,
    .syntax = {ToolSyntax::kKimiK2, ThinkSyntax::kMayThink},
    .render = RenderThinking,
    .ends_in_thinking = NeverThinks,
};

}  // namespace fathom
