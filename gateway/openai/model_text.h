// The text side of the served model: its tokenizer and its chat layout, as far as it has them.
//
// A checkpoint without tokenizer.json is served with token ids only; what needs text is refused
// with the reason kept here. Immutable after Load: any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "gateway/text/chat_encoding.h"
#include "gateway/text/output_markers.h"
#include "gateway/text/tokenizer.h"

namespace fathom {

// Recognised by the checkpoint's files.
inline constexpr char kAutoChatEncoding[] = "auto";

class ModelText {
 public:
  // `chat_encoding`: kAutoChatEncoding or one of ChatEncoder::Names. InvalidArgument when there is
  // a tokenizer.json and it cannot be used, FailedPrecondition when it lacks what that encoding
  // needs.
  static absl::StatusOr<ModelText> Load(const std::string& model_dir,
                                        const std::string& chat_encoding = kAutoChatEncoding);

  // Token ids only, for that reason.
  explicit ModelText(absl::Status why_no_text);

  // With a tokenizer, and a chat layout if `encoder` is ok.
  ModelText(std::unique_ptr<const Tokenizer> tokenizer, absl::StatusOr<ChatEncoder> encoder);

  // InvalidArgument naming `param` when there is no tokenizer, or no chat layout.
  absl::Status CheckHasText(std::string_view param) const;
  absl::Status CheckHasChat() const;

  // Null when there is no text.
  const Tokenizer* tokenizer() const { return tokenizer_.get(); }

  // CheckHasChat must be ok.
  const ChatEncoder& chat_encoder() const { return *chat_encoder_; }
  const OutputMarkers& output_markers() const { return *output_markers_; }

 private:
  std::unique_ptr<const Tokenizer> tokenizer_;
  std::optional<ChatEncoder> chat_encoder_;
  std::optional<OutputMarkers> output_markers_;  // of the same layout
  absl::Status why_no_text_;
  absl::Status why_no_chat_;
};

// How a token is called in logprobs.
class TokenNames {
 public:
  enum class Style { kText, kIds };

  // Without a tokenizer the style is always kIds.
  TokenNames(const Tokenizer* tokenizer, Style style)
      : tokenizer_(tokenizer), style_(tokenizer == nullptr ? Style::kIds : style) {}

  // The token's text, with U+FFFD for what is no whole character; or "token_id:N".
  std::string NameOf(uint32_t token_id) const;

  // The token's text, "" without a tokenizer.
  std::string TextOf(uint32_t token_id) const;

  // Its bytes as they are; those of the name without a tokenizer.
  std::string BytesOf(uint32_t token_id) const;

  bool has_text() const { return tokenizer_ != nullptr; }

 private:
  const Tokenizer* tokenizer_;
  Style style_;
};

}  // namespace fathom
