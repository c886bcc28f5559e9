// Chat messages to the prompt text DeepSeek's models were trained on, without a template engine.
//
// The layouts are those of DeepSeek's official chat templates, byte for byte:
//
//   BOS system "\n\n" system <｜User｜>user<｜Assistant｜>assistant EOS …
//
// with tool calls and their outputs between; `tools` are not rendered (the templates do not).
// Roles and reasoning are not second-guessed: what the template prints is printed.
// Source: chat_template in tokenizer_config.json of deepseek-ai/DeepSeek-V3 and -V3-0324.
#pragma once

#include <memory>
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
  // Chooses the layout. FailedPrecondition when the tokenizer has no BOS, EOS, <｜User｜> or
  // <｜Assistant｜>: such a model speaks another layout, and chat requests must be refused.
  static absl::StatusOr<ChatEncoder> Create(const Tokenizer& tokenizer);

  // The text of `messages`, beginning with BOS: tokenize it with BosPolicy::kNone.
  // InvalidArgument: no messages; a message without content that must have some; tool calls or
  // outputs when the tokenizer has no tokens for them; options that contradict each other.
  absl::StatusOr<std::string> Encode(absl::Span<const ChatMessage> messages,
                                     const ChatOptions& options) const;

 private:
  // How a list of tool calls is printed.
  enum class Layout {
    kV3,      // calls only when content is null; one call alone is left unclosed
    kV3_0324  // content before the calls; the list is always closed
  };
  ChatEncoder() = default;

  Layout layout_ = Layout::kV3_0324;
  std::string bos_;
  std::string eos_;
  bool has_tool_tokens_ = false;
};

}  // namespace fathom
