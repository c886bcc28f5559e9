#include "gateway/openai/model_text.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "gateway/openai/errors.h"
#include "gateway/text/detokenizer.h"

namespace fathom {

absl::StatusOr<ModelText> ModelText::Load(const std::string& model_dir,
                                          const std::string& chat_encoding) {
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Load(model_dir);
  if (tokenizer.ok() && chat_encoding == kAutoChatEncoding) {
    absl::StatusOr<ChatEncoder> encoder = ChatEncoder::Create(**tokenizer);
    return ModelText(*std::move(tokenizer), std::move(encoder));
  }
  if (tokenizer.ok()) {
    ASSIGN_OR_RETURN(ChatEncoder encoder, ChatEncoder::Create(**tokenizer, chat_encoding));
    return ModelText(*std::move(tokenizer), std::move(encoder));
  }
  if (absl::IsNotFound(tokenizer.status())) {
    return ModelText(absl::NotFoundError(
        "the served model has no tokenizer.json, so it takes and gives token ids only: send "
        "`prompt` as a list of token ids to /v1/completions"));
  }
  return tokenizer.status();
}

ModelText::ModelText(absl::Status why_no_text)
    : why_no_text_(why_no_text), why_no_chat_(std::move(why_no_text)) {}

ModelText::ModelText(std::unique_ptr<const Tokenizer> tokenizer,
                     absl::StatusOr<ChatEncoder> encoder)
    : tokenizer_(std::move(tokenizer)), why_no_chat_(encoder.status()) {
  if (!encoder.ok()) return;
  chat_encoder_ = *std::move(encoder);
  output_markers_.emplace(*tokenizer_, chat_encoder_->layout().syntax);
}

absl::Status ModelText::CheckHasText(std::string_view param) const {
  if (why_no_text_.ok()) return absl::OkStatus();
  return InvalidParameter(param, std::string(why_no_text_.message()));
}

absl::Status ModelText::CheckHasChat() const {
  if (why_no_chat_.ok()) return absl::OkStatus();
  return InvalidParameter("messages", std::string(why_no_chat_.message()));
}

std::string TokenNames::NameOf(uint32_t token_id) const {
  if (style_ == Style::kIds) return absl::StrCat("token_id:", token_id);
  return TextOf(token_id);
}

std::string TokenNames::TextOf(uint32_t token_id) const {
  if (tokenizer_ == nullptr) return {};
  return Decode(*tokenizer_, {&token_id, 1}, {.skip_special_tokens = false});
}

std::string TokenNames::BytesOf(uint32_t token_id) const {
  if (tokenizer_ == nullptr) return NameOf(token_id);
  return std::string(tokenizer_->BytesOf(token_id));
}

}  // namespace fathom
