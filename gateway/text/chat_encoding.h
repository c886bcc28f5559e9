// Chat messages to the prompt text DeepSeek's models were trained on, without a template engine.
//
// The layouts are those of DeepSeek's official chat templates, byte for byte:
//
//   BOS system "\n\n" system <｜User｜>user<｜Assistant｜>assistant EOS <｜User｜> …
//
// with tool calls and their outputs between; descriptions of tools are not printed (the templates
// do not). What a template prints is printed, oddities included, with one exception: DeepSeek-V3's
// drops the tool calls of a message whose content is not null; here "" counts as null, and other
// content is printed with its calls as V3-0324 does.
// Source: chat_template in tokenizer_config.json of deepseek-ai/DeepSeek-V3 and -V3-0324.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "gateway/text/tokenizer.h"

namespace fathom {

struct ChatToolCall {
  std::string type = "function";
  std::string name;
  std::string arguments;  // the JSON text, printed verbatim
};

struct ChatMessage {
  enum class Role { kSystem, kUser, kAssistant, kTool };
  Role role = Role::kUser;
  std::optional<std::string> content;    // null only for an assistant that calls tools
  std::vector<ChatToolCall> tool_calls;  // assistant only
};

struct ChatOptions {
  // Ends with <｜Assistant｜>, so that the model answers (not after tool outputs, where it goes on
  // directly).
  bool add_generation_prompt = true;
  // Leaves the last message open, so that the model goes on writing it. It must be a user's or an
  // assistant's, have content and call no tools. Not together with add_generation_prompt.
  bool continue_final_message = false;
};

// Immutable: Encode may be called from any thread.
class ChatEncoder {
 public:
  // Chooses the layout by the tokenizer's chat_template(): DeepSeek-V3's own, else V3-0324's.
  // FailedPrecondition when the model speaks another one, and chat requests must be refused: the
  // tokenizer has no BOS, EOS, <｜User｜> or <｜Assistant｜>, or the template handles <think>.
  static absl::StatusOr<ChatEncoder> Create(const Tokenizer& tokenizer);

  // The text of `messages`, beginning with BOS: tokenize it with BosPolicy::kNone.
  // InvalidArgument: no messages; a message without content that must have some; tool calls or
  // outputs when the tokenizer has no tokens for them; options that contradict each other.
  absl::StatusOr<std::string> Encode(absl::Span<const ChatMessage> messages,
                                     const ChatOptions& options) const;

 private:
  enum class Layout {
    kV3,      // <｜Assistant｜> before an answer; one tool call alone is left unclosed
    kV3_0324  // <｜Assistant｜> behind every question; tool calls are always closed
  };
  ChatEncoder() = default;

  absl::Status Validate(absl::Span<const ChatMessage> messages, const ChatOptions& options) const;
  std::string EncodeV3(absl::Span<const ChatMessage> messages, const ChatOptions& options) const;
  std::string EncodeV3_0324(absl::Span<const ChatMessage> messages,
                            const ChatOptions& options) const;

  Layout layout_ = Layout::kV3_0324;
  std::string bos_;
  std::string eos_;
  bool has_tool_tokens_ = false;
};

}  // namespace fathom
