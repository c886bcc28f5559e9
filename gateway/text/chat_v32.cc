// DeepSeek-V3.2: tools and their calls in DSML.
//
//   BOS system <｜User｜>user<｜Assistant｜></think>assistant EOS <｜User｜>user<｜Assistant｜>
//
// and then <think> or </think>, which also follow complete tool outputs. Thoughts are printed only
// behind the last user message. Tools belong to the first system message, or to an empty one before
// all others. A developer's message is a system message here, as everywhere else; the encoder's own
// role of that name, for search agents, is not used.
// Source: encoding/encoding_dsv32.py of deepseek-ai/DeepSeek-V3.2.
#include <string>
#include <vector>

#include "base/status_macros.h"
#include "gateway/text/chat_layout.h"
#include "gateway/text/concat.h"
#include "gateway/text/deepseek_markers.h"
#include "gateway/text/python_json.h"

namespace fathom {
namespace {

using namespace deepseek;  // NOLINT
using Role = ChatMessage::Role;

constexpr std::string_view kDsmlToken[] = {kDsml};

constexpr std::string_view kToolsHead =
    R"(## Tools
You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your reply to the user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>
String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types (numbers, booleans, arrays, objects).
If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. Here is an example:
<｜DSML｜function_calls>
...
</｜DSML｜function_calls>
<function_results>
...
</function_results>
<think>...thinking about results</think>
Here are the functions available in JSONSchema format:
<functions>
)";

std::string ToolsText(const std::vector<ChatTool>& tools) {
  std::string text(kToolsHead);
  for (const ChatTool& tool : tools) {
    Append(text, {&tool == &tools.front() ? "" : "\n", tool.function});
  }
  Append(text, {"\n</functions>\n"});
  return text;
}

absl::StatusOr<std::string> CallsText(const std::vector<ChatToolCall>& calls, std::string where) {
  std::string text = Concat({"\n\n<", kDsml, "function_calls>\n"});
  for (const ChatToolCall& call : calls) {
    const auto members = ReadJsonMembers(call.arguments);
    if (!members.ok()) {
      return absl::InvalidArgumentError(
          Concat({where, ": the arguments of the call of ", call.name,
                  " are no JSON object, which DeepSeek-V3.2's encoding needs"}));
    }
    Append(text, {"<", kDsml, "invoke name=\"", call.name, "\">\n"});
    bool is_first = true;
    for (const JsonMember& member : *members) {
      Append(text,
             {is_first ? "" : "\n", "<", kDsml, "parameter name=\"", member.key, "\" string=\"",
              member.is_string ? "true" : "false", "\">", member.value, "</", kDsml, "parameter>"});
      is_first = false;
    }
    Append(text, {"\n</", kDsml, "invoke>\n"});
  }
  Append(text, {"</", kDsml, "function_calls>"});
  return text;
}

// The conversation and how far it has come.
class Renderer {
 public:
  Renderer(absl::Span<const ChatMessage> messages, const ChatOptions& options)
      : messages_(messages), options_(options) {
    for (size_t i = 0; i < messages.size(); ++i) {
      if (messages[i].role == Role::kUser) last_user_ = static_cast<int>(i);
    }
  }

  absl::StatusOr<std::string> Render() {
    text_ = std::string(kBos);
    const bool is_system_first = messages_.front().role == Role::kSystem;
    if (!options_.tools.empty() && !is_system_first) AppendTools();
    for (size_t i = 0; i < messages_.size(); ++i) {
      RETURN_IF_ERROR(AppendMessage(static_cast<int>(i)));
      if (i == 0 && !options_.tools.empty() && is_system_first) AppendTools();
    }
    return std::move(text_);
  }

 private:
  void AppendTools() { Append(text_, {"\n\n", ToolsText(options_.tools)}); }

  absl::Status AppendMessage(int index) {
    const ChatMessage& message = messages_[index];
    const bool is_open = IsLeftOpen(message, messages_, options_);
    switch (message.role) {
      case Role::kSystem:
        text_ += *message.content;
        return absl::OkStatus();
      case Role::kUser:
        Append(text_, {kUser, *message.content});
        if (!is_open) {
          const bool thinks = index == last_user_ && options_.thinking;
          Append(text_, {kAssistant, thinks ? kThink : kThinkEnd});
        }
        return absl::OkStatus();
      case Role::kAssistant:
        RETURN_IF_ERROR(AppendAnswer(index));
        if (!is_open) text_ += kEos;
        return absl::OkStatus();
      case Role::kTool:
        return AppendToolOutput(index);
    }
    return absl::OkStatus();
  }

  std::string NameOf(int index) const { return Concat({"messages[", std::to_string(index), "]"}); }

  absl::Status AppendAnswer(int index) {
    const ChatMessage& message = messages_[index];
    if (options_.thinking && index > last_user_) {
      if (message.reasoning.empty() && message.tool_calls.empty()) {
        return absl::InvalidArgumentError(
            Concat({NameOf(index),
                    " (assistant): with thinking on, an answer behind the last user message "
                    "needs reasoning_content or tool_calls"}));
      }
      Append(text_, {message.reasoning, kThinkEnd});
    }
    text_ += message.content.value_or("");
    if (message.tool_calls.empty()) return absl::OkStatus();
    ASSIGN_OR_RETURN(const std::string calls, CallsText(message.tool_calls, NameOf(index)));
    text_ += calls;
    return absl::OkStatus();
  }

  absl::Status AppendToolOutput(int index) {
    int caller = index - 1;
    while (caller >= 0 && messages_[caller].role == Role::kTool) --caller;
    const int order = index - caller;
    const int num_calls = caller < 0 || messages_[caller].role != Role::kAssistant
                              ? 0
                              : static_cast<int>(messages_[caller].tool_calls.size());
    if (order > num_calls) {
      return absl::InvalidArgumentError(
          Concat({NameOf(index),
                  " (tool) answers no call: as many tool messages may follow an assistant's "
                  "message as it has tool_calls"}));
    }
    if (order == 1) Append(text_, {"\n\n<function_results>"});
    Append(text_, {"\n<result>", *messages_[index].content, "</result>"});
    if (order < num_calls) return absl::OkStatus();
    const bool thinks = index >= last_user_ && options_.thinking;
    Append(text_, {"\n</function_results>\n\n", thinks ? kThink : kThinkEnd});
    return absl::OkStatus();
  }

  const absl::Span<const ChatMessage> messages_;
  const ChatOptions& options_;
  int last_user_ = -1;
  std::string text_;
};

absl::StatusOr<std::string> Render(absl::Span<const ChatMessage> messages,
                                   const ChatOptions& options) {
  return Renderer(messages, options).Render();
}

bool EndsInThinking(absl::Span<const ChatMessage> messages, const ChatOptions& options) {
  const ChatMessage& last = messages.back();
  if (options.continue_final_message) return IsLeftThinking(last);
  return options.thinking && (last.role == Role::kUser || last.role == Role::kTool);
}

}  // namespace

const ChatLayout kChatV32 = {
    .name = "deepseek_v32",
    .what = "DeepSeek-V3.2",
    .tokens = kThinkingTokens,
    .tool_tokens = kDsmlToken,
    .syntax = {ToolSyntax::kDsml, ThinkSyntax::kThinkTags},
    .render = Render,
    .ends_in_thinking = EndsInThinking,
};

}  // namespace fathom
