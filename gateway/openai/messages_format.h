// The words of /v1/messages. Not thread-safe; one per request.
//
// A stream is message_start, the one content block as content_block_start, …_delta and …_stop, and
// message_delta (why it ended, and the usage), message_stop.
// Source: Anthropic's API reference, "Messages", "Streaming messages", "Errors".
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "gateway/openai/answer.h"
#include "gateway/openai/json_writer.h"
#include "gateway/openai/response_header.h"

namespace fathom {

// {"type":"error","error":{"type":…,"message":…},"request_id":…} with its HTTP status.
Response MessagesError(const absl::Status& status, const std::string& request_id);

class MessagesFormat : public AnswerFormat {
 public:
  MessagesFormat(ResponseHeader header, int64_t num_prompt_tokens)
      : header_(std::move(header)), num_prompt_tokens_(num_prompt_tokens) {}

  bool events_have_names() const override { return true; }
  std::string Whole(std::vector<ChoiceDelta> choices, const TokenUsage& usage) override;
  std::vector<std::string> FirstEvents(const std::optional<TokenUsage>& usage) override;
  std::string Event(size_t choice, ChoiceDelta delta,
                    const std::optional<TokenUsage>& usage) override;
  std::string UsageEvent(const TokenUsage& usage) override;
  Response Error(const absl::Status& status) override;
  std::string ErrorEvent(const absl::Status& status) override;

 private:
  // "id" to "model".
  void WriteHeader(JsonWriter& json) const;

  const ResponseHeader header_;
  const int64_t num_prompt_tokens_;
  ChoiceDelta end_;  // why it ended
};

}  // namespace fathom
