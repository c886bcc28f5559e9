// The words of /v1/messages. Not thread-safe; one per request.
//
// A stream is message_start, each content block as content_block_start, …_delta and …_stop, and
// message_delta (why it ended, and the usage), message_stop. Blocks are `thinking` (its signature
// is empty), `text` and `tool_use`. The input of a whole tool_use is an object: what the model
// wrote as arguments and is none becomes {"INVALID_JSON": …}, Anthropic's word for it. Source:
// Anthropic's API reference, "Messages", "Streaming messages", "Errors".
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "gateway/openai/answer.h"
#include "gateway/openai/answer_items.h"
#include "gateway/openai/json_writer.h"
#include "gateway/openai/response_header.h"

namespace fathom {

// {"type":"error","error":{"type":…,"message":…},"request_id":…} with its HTTP status.
Response MessagesError(const absl::Status& status, const std::string& request_id);

class MessagesFormat : public AnswerFormat, private AnswerItems::Listener {
 public:
  MessagesFormat(ResponseHeader header, int64_t num_prompt_tokens)
      : header_(std::move(header)), num_prompt_tokens_(num_prompt_tokens) {}

  bool events_have_names() const override { return true; }
  std::string Whole(std::vector<ChoiceDelta> choices, const TokenUsage& usage) override;
  std::vector<std::string> FirstEvents(const std::optional<TokenUsage>& usage) override;
  std::string Event(size_t choice, const ChoiceDelta& delta,
                    const std::optional<TokenUsage>& usage) override;
  std::string UsageEvent(const TokenUsage& usage) override;
  Response Error(const absl::Status& status) override;
  std::string ErrorEvent(const absl::Status& status) override;

 private:
  void OnBegin(const AnswerItem& item) override;
  void OnPiece(const AnswerItem& item, std::string_view piece) override;
  void OnEnd(const AnswerItem& item) override;

  // {"type":TYPE, and what the caller adds up to EndEvent.
  static JsonWriter BeginEvent(std::string_view type);
  static JsonWriter BeginBlockEvent(std::string_view type, const AnswerItem& item);
  void EndEvent(std::string_view type, JsonWriter json);
  // "id" to "model".
  void WriteHeader(JsonWriter& json) const;

  const ResponseHeader header_;
  const int64_t num_prompt_tokens_;
  AnswerItems items_;
  ChoiceDelta end_;     // why it ended
  std::string events_;  // not yet returned
};

}  // namespace fathom
