// Any bytes as the body of a chat, a response or a message (the first byte says which): refused, or
// a prompt in each format that can say it.
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/check.h"
#include "gateway/openai/chat_request.h"
#include "gateway/openai/messages_request.h"
#include "gateway/openai/responses_request.h"
#include "gateway/text/chat_encoding.h"
#include "tests/gateway/text/golden.h"

namespace fathom {
namespace {

std::vector<ChatEncoder> AllEncoders() {
  static const Tokenizer& tokenizer = *ThinkingTokenizer().release();
  std::vector<ChatEncoder> encoders;
  for (const std::string& name : ChatEncoder::Names()) {
    encoders.push_back(ChatEncoder::Create(tokenizer, name).value());
  }
  return encoders;
}

absl::StatusOr<ChatRequest> Parse(uint8_t kind, std::string_view body) {
  switch (kind % 3) {
    case 0:
      return ParseChatRequest(body, {}, {});
    case 1: {
      auto request = ParseResponsesRequest(body, {}, {});
      if (!request.ok()) return request.status();
      return std::move(request->chat);
    }
    default:
      return ParseMessagesRequest(body, {}, {});
  }
}

void Check(uint8_t kind, std::string_view body) {
  static const std::vector<ChatEncoder>& encoders = *new std::vector<ChatEncoder>(AllEncoders());
  const auto request = Parse(kind, body);
  if (!request.ok()) {
    CHECK(!request.status().message().empty());
    return;
  }
  const ChatPrompt& prompt = request->prompt;
  CHECK(!prompt.messages.empty());
  for (const ChatEncoder& encoder : encoders) {
    const auto text = encoder.Encode(prompt.messages, prompt.options);
    if (!text.ok()) continue;
    CHECK(!text->empty());
    encoder.EndsInThinking(prompt.messages, prompt.options);
  }
}

}  // namespace
}  // namespace fathom

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size > 0) fathom::Check(data[0], {reinterpret_cast<const char*>(data) + 1, size - 1});
  return 0;
}
