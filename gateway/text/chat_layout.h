// How one family of checkpoints writes a conversation: a file per format, chat_v3.cc and on.
//
// Each prints what the checkpoint's own template prints, byte for byte, oddities included; what it
// does differently, where the template would fail or lose something, its file says. chat_encoding.h
// chooses one and checks conversations before a layout sees them.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "gateway/text/chat_message.h"
#include "gateway/text/output_syntax.h"

namespace fathom {

// A conversation and its end. The messages are valid as ChatEncoder says.
struct ChatLayout {
  std::string_view name;  // for --chat-encoding
  std::string_view what;  // the checkpoints it is for

  absl::Span<const std::string_view> tokens;       // the tokenizer must have these
  absl::Span<const std::string_view> tool_tokens;  // and these for tools

  OutputSyntax syntax;

  // InvalidArgument where the format cannot say what the conversation says.
  absl::StatusOr<std::string> (*render)(absl::Span<const ChatMessage> messages,
                                        const ChatOptions& options);

  // Whether what is rendered ends within <think>, so that the model goes on thinking.
  bool (*ends_in_thinking)(absl::Span<const ChatMessage> messages, const ChatOptions& options);
};

extern const ChatLayout kChatV3;
extern const ChatLayout kChatV3_0324;
extern const ChatLayout kChatR1First;
extern const ChatLayout kChatR1;
extern const ChatLayout kChatR1_0528;
extern const ChatLayout kChatV31;
extern const ChatLayout kChatV32;
extern const ChatLayout kChatKimiK2;
extern const ChatLayout kChatKimiK2Thinking;

}  // namespace fathom
