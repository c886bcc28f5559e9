#include "gateway/text/deepseek_markers.h"

#include "gateway/text/concat.h"

namespace fathom::deepseek {
namespace {

void AppendTools(const std::vector<ChatTool>& tools, std::string_view form_of_a_call,
                 std::string& text) {
  Append(text, {"\n\n## Tools\nYou have access to the following tools:\n"});
  for (const ChatTool& tool : tools) {
    Append(text, {"\n### ", tool.name, "\nDescription: ", tool.description,
                  "\n\nParameters: ", tool.parameters, "\n"});
  }
  Append(text, {"\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n", kCallsBegin,
                form_of_a_call, "{{additional_tool_calls}}", kCallsEnd,
                "\n\nWhere:\n\n"
                "- `tool_call_name` must be an exact match to one of the available tools\n"
                "- `tool_call_arguments` must be valid JSON that strictly follows the tool's "
                "Parameters Schema\n"
                "- For multiple tool calls, chain them directly without separators or spaces\n"});
}

}  // namespace

std::string SystemPrompt(absl::Span<const ChatMessage> messages, const ChatOptions& options,
                         std::string_view form_of_a_call) {
  std::string text;
  bool is_first = true;
  for (const ChatMessage& message : messages) {
    if (message.role != ChatMessage::Role::kSystem) continue;
    Append(text, {is_first ? "" : "\n\n", *message.content});
    is_first = false;
  }
  if (!options.tools.empty()) AppendTools(options.tools, form_of_a_call, text);
  return text;
}

std::string CallWithType(const ChatToolCall& call) {
  return Concat({kCallBegin, call.type, kSeparator, call.name, "\n```json\n", call.arguments,
                 "\n```", kCallEnd});
}

std::string_view AfterThinking(std::string_view content) {
  const size_t end = content.rfind(kThinkEnd);
  return end == std::string_view::npos ? content : content.substr(end + kThinkEnd.size());
}

bool IsLeftThinking(const ChatMessage& message) {
  if (message.role != ChatMessage::Role::kAssistant || !message.content) return false;
  const size_t begin = message.content->rfind(kThink);
  return begin != std::string::npos && message.content->find(kThinkEnd, begin) == std::string::npos;
}

bool IsLeftOpen(const ChatMessage& message, absl::Span<const ChatMessage> messages,
                const ChatOptions& options) {
  return options.continue_final_message && &message == &messages.back();
}

}  // namespace fathom::deepseek
