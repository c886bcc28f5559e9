// The words of /v1/chat/completions. Not thread-safe; one per request.
//
// Source: vllm/entrypoints/openai/chat_completion/{protocol,serving}.py (0.16).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gateway/openai/answer.h"
#include "gateway/openai/json_writer.h"
#include "gateway/openai/model_text.h"
#include "gateway/openai/response_header.h"

namespace fathom {

struct ChatFormatOptions {
  ResponseHeader header;
  std::vector<uint32_t> prompt;  // token ids, for return_token_ids
  std::string echo_text;         // precedes every answer
  int n = 1;
  bool has_logprobs = false;
  bool has_prompt_logprobs = false;
  bool return_token_ids = false;
};

class ChatFormat : public AnswerFormat {
 public:
  ChatFormat(ChatFormatOptions options, TokenNames names);

  std::string Whole(std::vector<ChoiceDelta> choices, const TokenUsage& usage) override;
  // The role of each choice, then what is echoed.
  std::vector<std::string> FirstEvents(const std::optional<TokenUsage>& usage) override;
  std::string Event(size_t choice, const ChoiceDelta& delta,
                    const std::optional<TokenUsage>& usage) override;
  std::string UsageEvent(const TokenUsage& usage) override;

 private:
  // The fields of a message that were written, "content": "" where none was.
  void WriteDelta(const MessageDelta& message, JsonWriter& json) const;
  void WriteMessage(const MessageDelta& message, JsonWriter& json) const;
  void WriteLogprobs(const ChoiceDelta& delta, JsonWriter& json) const;
  std::string RoleEvent(int choice, const std::optional<TokenUsage>& usage) const;
  std::string EchoEvent(int choice, const std::optional<TokenUsage>& usage) const;

  const ChatFormatOptions options_;
  const TokenNames names_;
  const std::string chunk_beginning_;  // of every event
};

}  // namespace fathom
