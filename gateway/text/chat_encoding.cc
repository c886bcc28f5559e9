#include "gateway/text/chat_encoding.h"

#include <algorithm>

#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "gateway/text/concat.h"
#include "gateway/text/deepseek_markers.h"

namespace fathom {
namespace {

using Role = ChatMessage::Role;

constexpr std::string_view kNoToolTokens = ": the model's tokenizer has no tokens for tool calls";

constexpr const ChatLayout* kLayouts[] = {
    &kChatV3,  &kChatV3_0324, &kChatR1First,        &kChatR1, &kChatR1_0528, &kChatV31,
    &kChatV32, &kChatKimiK2,  &kChatKimiK2Thinking,
};

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

// The layout that a template's text shows; null for one we do not know.
const ChatLayout* LayoutOfTemplate(std::string_view text) {
  const auto mentions = [text](std::string_view part) {
    return text.find(part) != std::string_view::npos;
  };
  if (mentions("<|im_middle|>")) return mentions("<think>") ? &kChatKimiK2Thinking : &kChatKimiK2;
  if (!mentions(deepseek::kUser) || !mentions(deepseek::kAssistant)) return nullptr;
  if (mentions(deepseek::kDsml)) return &kChatV32;
  if (!mentions(deepseek::kThinkEnd)) {
    // The variables by which the two official templates differ.
    return mentions("is_output_first") && !mentions("is_last_user") ? &kChatV3 : &kChatV3_0324;
  }
  if (mentions("thinking")) return &kChatV31;
  if (mentions("is_last_user")) return &kChatR1_0528;
  if (!mentions(deepseek::kThink)) return nullptr;
  return mentions("is_first_sp") ? &kChatR1 : &kChatR1First;
}

// DeepSeek-V3.2 has no template but code; its tokenizer has a token that no other has.
const ChatLayout& LayoutOfTokens(const Tokenizer& tokenizer) {
  return tokenizer.FindAddedToken(deepseek::kDsml).has_value() ? kChatV32 : kChatV3_0324;
}

}  // namespace

absl::StatusOr<ChatEncoder> ChatEncoder::Create(const Tokenizer& tokenizer) {
  const std::string& text = tokenizer.chat_template();
  if (text.empty()) return WithLayout(tokenizer, LayoutOfTokens(tokenizer));
  const ChatLayout* layout = LayoutOfTemplate(text);
  if (layout != nullptr) return WithLayout(tokenizer, *layout);
  return absl::FailedPreconditionError(
      Concat({"the checkpoint's chat_template is none of those that are known; if the model "
              "speaks one of them all the same, name it with --chat-encoding: ",
              absl::StrJoin(Names(), ", ")}));
}

absl::StatusOr<ChatEncoder> ChatEncoder::Create(const Tokenizer& tokenizer, std::string_view name) {
  for (const ChatLayout* layout : kLayouts) {
    if (layout->name == name) return WithLayout(tokenizer, *layout);
  }
  return absl::InvalidArgumentError(Concat(
      {"there is no chat encoding '", name, "', expected one of ", absl::StrJoin(Names(), ", ")}));
}

std::vector<std::string> ChatEncoder::Names() {
  std::vector<std::string> names;
  for (const ChatLayout* layout : kLayouts) names.emplace_back(layout->name);
  return names;
}

absl::StatusOr<ChatEncoder> ChatEncoder::WithLayout(const Tokenizer& tokenizer,
                                                    const ChatLayout& layout) {
  const auto is_known = [&](std::string_view token) {
    return tokenizer.FindAddedToken(token).has_value();
  };
  for (const std::string_view token : layout.tokens) {
    if (is_known(token)) continue;
    return absl::FailedPreconditionError(
        Concat({"the tokenizer has no token ", token, ", which the chat encoding ", layout.name,
                " needs"}));
  }
  ChatEncoder encoder(layout);
  encoder.has_tool_tokens_ =
      std::all_of(layout.tool_tokens.begin(), layout.tool_tokens.end(), is_known);
  return encoder;
}

absl::Status ChatEncoder::CheckTools(absl::Span<const ChatTool> tools) const {
  if (tools.empty() || has_tool_tokens_) return absl::OkStatus();
  return absl::InvalidArgumentError(Concat({"tools", kNoToolTokens}));
}

absl::Status ChatEncoder::Validate(absl::Span<const ChatMessage> messages,
                                   const ChatOptions& options) const {
  if (messages.empty()) return absl::InvalidArgumentError("messages must not be empty");
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    const std::string where =
        Concat({"messages[", std::to_string(i), "] (", NameOf(message.role), ")"});
    const bool calls_tools = !message.tool_calls.empty();
    if (calls_tools && message.role != Role::kAssistant) {
      return absl::InvalidArgumentError(Concat({where, " has tool_calls"}));
    }
    if (!message.content.has_value() && !calls_tools) {
      return absl::InvalidArgumentError(Concat({where, " has no content"}));
    }
    if ((calls_tools || message.role == Role::kTool) && !has_tool_tokens_) {
      return absl::InvalidArgumentError(Concat({where, kNoToolTokens}));
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
  RETURN_IF_ERROR(CheckTools(options.tools));
  RETURN_IF_ERROR(Validate(messages, options));
  return layout_->render(messages, options);
}

bool ChatEncoder::EndsInThinking(absl::Span<const ChatMessage> messages,
                                 const ChatOptions& options) const {
  return layout_->ends_in_thinking(messages, options);
}

}  // namespace fathom
