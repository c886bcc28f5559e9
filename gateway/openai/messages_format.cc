#include "gateway/openai/messages_format.h"

#include <utility>
#include <variant>

#include "gateway/http/response.h"
#include "gateway/openai/errors.h"

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
    json.String(end.finish_reason == "length" ? "max_tokens" : "end_turn");
  }
  json.Key("stop_sequence");
  if (stop_string != nullptr) {
    json.String(*stop_string);
  } else {
    json.Null();
  }
}

// Tokens that were found in the cache count apart.
void WriteUsage(const TokenUsage& usage, JsonWriter& json) {
  json.Key("usage").BeginObject();
  json.Key("input_tokens").Int(usage.prompt_tokens - usage.cached_tokens);
  json.Key("cache_creation_input_tokens").Int(0);
  json.Key("cache_read_input_tokens").Int(usage.cached_tokens);
  json.Key("output_tokens").Int(usage.completion_tokens).EndObject();
}

void AppendEvent(std::string_view name, JsonWriter json, std::string& events) {
  json.EndObject();
  AppendNamedEvent(name, json.text(), events);
}

JsonWriter BeginEvent(std::string_view type) {
  JsonWriter json;
  json.BeginObject().Key("type").String(type);
  return json;
}

}  // namespace

Response MessagesError(const absl::Status& status, const std::string& request_id) {
  Response response = ErrorResponse(status);
  JsonWriter json = BeginEvent("error");
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
  std::string events;
  AppendNamedEvent("error", MessagesError(status, header_.id).body, events);
  return events;
}

void MessagesFormat::WriteHeader(JsonWriter& json) const {
  json.Key("id").String(header_.id).Key("type").String("message");
  json.Key("role").String("assistant").Key("model").String(header_.model);
}

std::string MessagesFormat::Whole(std::vector<ChoiceDelta> choices, const TokenUsage& usage) {
  const ChoiceDelta& answer = choices.front();
  JsonWriter json;
  json.BeginObject();
  WriteHeader(json);
  json.Key("content").BeginArray().BeginObject().Key("type").String("text");
  json.Key("text").String(answer.message.content).EndObject().EndArray();
  WriteEnd(answer, json);
  WriteUsage(usage, json);
  json.EndObject();
  return json.Take();
}

std::vector<std::string> MessagesFormat::FirstEvents(const std::optional<TokenUsage>&) {
  std::string events;
  JsonWriter start = BeginEvent("message_start");
  start.Key("message").BeginObject();
  WriteHeader(start);
  start.Key("content").BeginArray().EndArray();
  WriteEnd({}, start);
  WriteUsage({.prompt_tokens = num_prompt_tokens_}, start);
  start.EndObject();
  AppendEvent("message_start", std::move(start), events);
  JsonWriter block = BeginEvent("content_block_start");
  block.Key("index").Int(0).Key("content_block").BeginObject();
  block.Key("type").String("text").Key("text").String("").EndObject();
  AppendEvent("content_block_start", std::move(block), events);
  return {std::move(events)};
}

std::string MessagesFormat::Event(size_t, ChoiceDelta delta, const std::optional<TokenUsage>&) {
  std::string events;
  if (!delta.message.content.empty()) {
    JsonWriter json = BeginEvent("content_block_delta");
    json.Key("index").Int(0).Key("delta").BeginObject().Key("type").String("text_delta");
    json.Key("text").String(delta.message.content).EndObject();
    AppendEvent("content_block_delta", std::move(json), events);
  }
  if (!delta.finish_reason.empty()) {
    JsonWriter json = BeginEvent("content_block_stop");
    json.Key("index").Int(0);
    AppendEvent("content_block_stop", std::move(json), events);
    end_.finish_reason = delta.finish_reason;
    end_.stop_reason = std::move(delta.stop_reason);
  }
  return events;
}

std::string MessagesFormat::UsageEvent(const TokenUsage& usage) {
  std::string events;
  JsonWriter delta = BeginEvent("message_delta");
  delta.Key("delta").BeginObject();
  WriteEnd(end_, delta);
  delta.EndObject();
  WriteUsage(usage, delta);
  AppendEvent("message_delta", std::move(delta), events);
  AppendEvent("message_stop", BeginEvent("message_stop"), events);
  return events;
}

}  // namespace fathom
