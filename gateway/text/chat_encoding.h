// Chat messages to the prompt text a model was trained on, without a template engine.
//
// The layouts are those of the official chat templates, byte for byte (chat_layout.h). Which one a
// checkpoint speaks is recognised by its chat_template, or by its tokens where it has none; an
// operator can name it instead.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "gateway/text/chat_layout.h"
#include "gateway/text/chat_message.h"
#include "gateway/text/tokenizer.h"

namespace fathom {

// Immutable: any thread.
class ChatEncoder {
 public:
  // Recognises the layout. FailedPrecondition when the model speaks another one, and chat requests
  // must be refused: its template is none of those we know, or its tokenizer lacks a token.
  static absl::StatusOr<ChatEncoder> Create(const Tokenizer& tokenizer);

  // The layout of that name. InvalidArgument when there is none; FailedPrecondition when the
  // tokenizer lacks a token of it.
  static absl::StatusOr<ChatEncoder> Create(const Tokenizer& tokenizer, std::string_view name);

  // Those that Create takes.
  static std::vector<std::string> Names();

  // InvalidArgument when there are some, and the tokenizer has no tokens for them.
  absl::Status CheckTools(absl::Span<const ChatTool> tools) const;

  // The text of `messages`, with BOS where the model wants it: tokenize it with BosPolicy::kNone.
  // InvalidArgument: CheckTools; no messages; a message without content that must have some; tool
  // calls or outputs when the tokenizer has no tokens for them; options that contradict each other;
  // what the layout cannot say.
  absl::StatusOr<std::string> Encode(absl::Span<const ChatMessage> messages,
                                     const ChatOptions& options) const;

  // Whether that text ends within the model's thoughts. Encode must have been ok.
  bool EndsInThinking(absl::Span<const ChatMessage> messages, const ChatOptions& options) const;

  const ChatLayout& layout() const { return *layout_; }
  bool has_tool_tokens() const { return has_tool_tokens_; }

 private:
  static absl::StatusOr<ChatEncoder> WithLayout(const Tokenizer& tokenizer,
                                                const ChatLayout& layout);
  explicit ChatEncoder(const ChatLayout& layout) : layout_(&layout) {}

  absl::Status Validate(absl::Span<const ChatMessage> messages, const ChatOptions& options) const;

  const ChatLayout* layout_;
  bool has_tool_tokens_ = false;
};

}  // namespace fathom
