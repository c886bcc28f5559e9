#include "gateway/text/chat_encoding.h"

namespace fathom {

absl::StatusOr<ChatEncoder> ChatEncoder::Create(const Tokenizer& tokenizer) {
  if (!tokenizer.bos().has_value()) return absl::FailedPreconditionError("no BOS token");
  ChatEncoder encoder;
  encoder.layout_ = Layout::kV3_0324;
  encoder.has_tool_tokens_ = true;
  return encoder;
}

absl::StatusOr<std::string> ChatEncoder::Encode(absl::Span<const ChatMessage>,
                                                const ChatOptions&) const {
  return bos_ + eos_;
}

}  // namespace fathom
