#include "gateway/openai/messages_format.h"

#include <utility>
#include <variant>

#include "gateway/http/response.h"
#include "gateway/openai/errors.h"
#include "gateway/text/python_json.h"

namespace fathom {
namespace {

std::string_view ErrorTypeOf(int http_status) {
  switch (http_status) {
    case 400:
      return "invalid_request_error";
    case 401:
      return "authentication_error";
    case 404:
      return "not_found_error";
    case 429:
      return "rate_limit_error";
    case 503:
      return "overloaded_error";
    default:
      return "api_error";
  }
}

// "stop_reason" and "stop_sequence".
void WriteEnd(const ChoiceDelta& end, JsonWriter& json) {
  const std::string* stop_string = std::get_if<std::string>(&end.stop_reason);
  json.Key("stop_reason");
  if (end.finish_reason.empty()) {
    json.Null();
  } else if (stop_string != nullptr) {
    json.String("stop_sequence");
  } else {
    json.String(end.finish_reason == "length"       ? "max_tokens"
                : end.finish_reason == "tool_calls" ? "tool_use"
                                                    : "end_turn");
  }
  json.Key("stop_sequence");
  if (stop_string != nullptr) {
    json.String(*stop_string);
  } else {
    json.Null();
  }
}

// Tokens that were found in the cache count apart.
void WriteMessageUsage(const TokenUsage& usage, JsonWriter& json) {
  json.Key("usage").BeginObject();
  json.Key("input_tokens").Int(usage.prompt_tokens - usage.cached_tokens);
  json.Key("cache_creation_input_tokens").Int(0);
  json.Key("cache_read_input_tokens").Int(usage.cached_tokens);
  json.Key("output_tokens").Int(usage.completion_tokens).EndObject();
}

enum class BlockState { kBegun, kComplete };

void WriteBlock(const AnswerItem& item, BlockState state, JsonWriter& json) {
  const bool complete = state == BlockState::kComplete;
  const std::string_view text = complete ? std::string_view(item.text) : "";
  json.BeginObject().Key("type");
  switch (item.kind()) {
    case AnswerItem::Kind::kReasoning:
      json.String("thinking").Key("thinking").String(text).Key("signature").String("");
      break;
    case AnswerItem::Kind::kContent:
      json.String("text").Key("text").String(text);
      break;
    case AnswerItem::Kind::kToolCall:
      json.String("tool_use").Key("id").String(item.call_id).Key("name").String(item.name);
      json.Key("input");
      if (!complete) {
        json.BeginObject().EndObject();
      } else if (ReadJsonMembers(text).ok()) {
        json.Raw(text);
      } else {
        json.BeginObject().Key("INVALID_JSON").String(text).EndObject();
      }
      break;
  }
  json.EndObject();
}

}  // namespace

Response MessagesError(const absl::Status& status, const std::string& request_id) {
  Response response = ErrorResponse(status);
  JsonWriter json;
  json.BeginObject().Key("type").String("error");
  json.Key("error").BeginObject().Key("type").String(ErrorTypeOf(response.status));
  json.Key("message").String(std::string(status.message())).EndObject();
  json.Key("request_id").String(request_id).EndObject();
  response.body = json.Take();
  return response;
}

Response MessagesFormat::Error(const absl::Status& status) {
  return MessagesError(status, header_.id);
}

std::string MessagesFormat::ErrorEvent(const absl::Status& status) {
  AppendNamedEvent("error", MessagesError(status, header_.id).body, events_);
  return std::exchange(events_, "");
}

JsonWriter MessagesFormat::BeginEvent(std::string_view type) {
  JsonWriter json;
  json.BeginObject().Key("type").String(type);
  return json;
}

JsonWriter MessagesFormat::BeginBlockEvent(std::string_view type, const AnswerItem& item) {
  JsonWriter json = BeginEvent(type);
  json.Key("index").Int(static_cast<int64_t>(item.index));
  return json;
}

void MessagesFormat::EndEvent(std::string_view type, JsonWriter json) {
  json.EndObject();
  AppendNamedEvent(type, json.text(), events_);
}

void MessagesFormat::WriteHeader(JsonWriter& json) const {
  json.Key("id").String(header_.id).Key("type").String("message");
  json.Key("role").String("assistant").Key("model").String(header_.model);
}

std::string MessagesFormat::Whole(std::vector<ChoiceDelta> choices, const TokenUsage& usage) {
  const ChoiceDelta& answer = choices.front();
  items_.Append(answer.message, nullptr);
  JsonWriter json;
  json.BeginObject();
  WriteHeader(json);
  json.Key("content").BeginArray();
  for (const AnswerItem& item : items_.items()) WriteBlock(item, BlockState::kComplete, json);
  json.EndArray();
  WriteEnd(answer, json);
  WriteMessageUsage(usage, json);
  json.EndObject();
  return json.Take();
}

std::vector<std::string> MessagesFormat::FirstEvents(const std::optional<TokenUsage>&) {
  JsonWriter start = BeginEvent("message_start");
  start.Key("message").BeginObject();
  WriteHeader(start);
  start.Key("content").BeginArray().EndArray();
  WriteEnd({}, start);
  WriteMessageUsage({.prompt_tokens = num_prompt_tokens_}, start);
  start.EndObject();
  EndEvent("message_start", std::move(start));
  return {std::exchange(events_, "")};
}

void MessagesFormat::OnBegin(const AnswerItem& item) {
  JsonWriter json = BeginBlockEvent("content_block_start", item);
  json.Key("content_block");
  WriteBlock(item, BlockState::kBegun, json);
  EndEvent("content_block_start", std::move(json));
}

void MessagesFormat::OnPiece(const AnswerItem& item, std::string_view piece) {
  JsonWriter json = BeginBlockEvent("content_block_delta", item);
  json.Key("delta").BeginObject().Key("type");
  switch (item.kind()) {
    case AnswerItem::Kind::kReasoning:
      json.String("thinking_delta").Key("thinking").String(piece);
      break;
    case AnswerItem::Kind::kContent:
      json.String("text_delta").Key("text").String(piece);
      break;
    case AnswerItem::Kind::kToolCall:
      json.String("input_json_delta").Key("partial_json").String(piece);
      break;
  }
  json.EndObject();
  EndEvent("content_block_delta", std::move(json));
}

void MessagesFormat::OnEnd(const AnswerItem& item) {
  EndEvent("content_block_stop", BeginBlockEvent("content_block_stop", item));
}

std::string MessagesFormat::Event(size_t, const ChoiceDelta& delta,
                                  const std::optional<TokenUsage>&) {
  items_.Append(delta.message, this);
  if (!delta.finish_reason.empty()) {
    items_.Finish(this);
    end_.finish_reason = delta.finish_reason;
    end_.stop_reason = delta.stop_reason;
  }
  return std::exchange(events_, "");
}

std::string MessagesFormat::UsageEvent(const TokenUsage& usage) {
  JsonWriter delta = BeginEvent("message_delta");
  delta.Key("delta").BeginObject();
  WriteEnd(end_, delta);
  delta.EndObject();
  WriteMessageUsage(usage, delta);
  EndEvent("message_delta", std::move(delta));
  EndEvent("message_stop", BeginEvent("message_stop"));
  return std::exchange(events_, "");
}

}  // namespace fathom
