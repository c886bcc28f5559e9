#include "gateway/openai/chat_format.h"

#include <utility>

#include "gateway/openai/answer_json.h"
#include "gateway/openai/logprobs.h"

namespace fathom {
namespace {

// The end of a chunk's choice and of its choices; the usage if the client wants it all along.
void EndChoice(const std::optional<TokenUsage>& usage, JsonWriter& json) {
  json.EndObject().EndArray();
  if (!usage) return;
  json.Key("usage");
  WriteUsage(*usage, json);
}

}  // namespace

ChatFormat::ChatFormat(ChatFormatOptions options, TokenNames names)
    : options_(std::move(options)),
      names_(names),
      chunk_beginning_(BeginningOf(options_.header, "chat.completion.chunk")) {}

void ChatFormat::WriteLogprobs(const ChoiceDelta& delta, JsonWriter& json) const {
  json.Key("logprobs");
  if (!options_.has_logprobs) {
    json.Null();
    return;
  }
  std::vector<TokenRecord> tokens;
  for (size_t i = 0; i < delta.logprobs.size(); ++i) {
    tokens.push_back({delta.token_ids[i], &delta.logprobs[i]});
  }
  WriteChatLogprobs(tokens, names_, json);
}

void ChatFormat::WriteMessage(const MessageDelta& message, JsonWriter& json) const {
  json.Key("message").BeginObject().Key("role").String("assistant").Key("content");
  const std::string content = options_.echo_text + message.content;
  const bool has_more = !message.reasoning.empty() || !message.tool_calls.empty();
  if (content.empty() && has_more) {
    json.Null();
  } else {
    json.String(content);
  }
  json.Key("refusal").Null().Key("annotations").Null().Key("audio").Null();
  json.Key("function_call").Null().Key("tool_calls").BeginArray();
  for (const ToolCallDelta& call : message.tool_calls) {
    json.BeginObject().Key("id").String(call.id).Key("type").String("function");
    json.Key("function").BeginObject().Key("name").String(call.name);
    json.Key("arguments").String(call.arguments).EndObject().EndObject();
  }
  json.EndArray();
  // Under both names: clients know one or the other.
  for (const char* name : {"reasoning", "reasoning_content"}) {
    json.Key(name);
    if (message.reasoning.empty()) {
      json.Null();
    } else {
      json.String(message.reasoning);
    }
  }
  json.EndObject();
}

void ChatFormat::WriteDelta(const MessageDelta& message, JsonWriter& json) const {
  json.Key("delta").BeginObject();
  if (!message.reasoning.empty()) {
    json.Key("reasoning").String(message.reasoning);
    json.Key("reasoning_content").String(message.reasoning);
  }
  if (!message.content.empty() || message.empty()) json.Key("content").String(message.content);
  if (!message.tool_calls.empty()) {
    json.Key("tool_calls").BeginArray();
    for (const ToolCallDelta& call : message.tool_calls) {
      json.BeginObject().Key("index").Int(static_cast<int64_t>(call.index));
      if (!call.id.empty()) json.Key("id").String(call.id).Key("type").String("function");
      json.Key("function").BeginObject();
      if (!call.id.empty()) json.Key("name").String(call.name);
      json.Key("arguments").String(call.arguments).EndObject().EndObject();
    }
    json.EndArray();
  }
  json.EndObject();
}

std::string ChatFormat::Whole(std::vector<ChoiceDelta> choices, const TokenUsage& usage) {
  JsonWriter json(BeginningOf(options_.header, "chat.completion"));
  json.Key("choices").BeginArray();
  for (size_t i = 0; i < choices.size(); ++i) {
    const ChoiceDelta& choice = choices[i];
    json.BeginObject().Key("index").Int(static_cast<int64_t>(i));
    WriteMessage(choice.message, json);
    WriteLogprobs(choice, json);
    WriteFinishReason(choice, json);
    WriteStopReason(choice, json);
    json.Key("token_ids");
    WriteTokenIds(options_.return_token_ids ? &choice.token_ids : nullptr, json);
    json.EndObject();
  }
  json.EndArray().Key("service_tier").Null().Key("system_fingerprint").Null().Key("usage");
  WriteUsageWithDetails(usage, json);
  json.Key("prompt_logprobs");
  if (options_.has_prompt_logprobs && !choices.empty()) {
    WritePromptLogprobs(choices.front().prompt_logprobs, names_, json);
  } else {
    json.Null();
  }
  json.Key("prompt_token_ids");
  WriteTokenIds(options_.return_token_ids ? &options_.prompt : nullptr, json);
  json.Key("kv_transfer_params").Null().EndObject();
  return json.Take();
}

std::string ChatFormat::RoleEvent(int choice, const std::optional<TokenUsage>& usage) const {
  JsonWriter json(chunk_beginning_);
  json.Key("choices").BeginArray().BeginObject().Key("index").Int(choice);
  json.Key("delta").BeginObject().Key("role").String("assistant").Key("content").String("");
  json.EndObject().Key("logprobs").Null().Key("finish_reason").Null();
  EndChoice(usage, json);
  json.Key("prompt_token_ids");
  WriteTokenIds(options_.return_token_ids ? &options_.prompt : nullptr, json);
  json.EndObject();
  return json.Take();
}

std::string ChatFormat::EchoEvent(int choice, const std::optional<TokenUsage>& usage) const {
  JsonWriter json(chunk_beginning_);
  json.Key("choices").BeginArray().BeginObject().Key("index").Int(choice);
  json.Key("delta").BeginObject().Key("content").String(options_.echo_text).EndObject();
  json.Key("logprobs").Null().Key("finish_reason").Null();
  EndChoice(usage, json);
  json.EndObject();
  return json.Take();
}

std::vector<std::string> ChatFormat::FirstEvents(const std::optional<TokenUsage>& usage) {
  std::vector<std::string> events;
  for (int i = 0; i < options_.n; ++i) events.push_back(RoleEvent(i, usage));
  if (options_.echo_text.empty()) return events;
  for (int i = 0; i < options_.n; ++i) events.push_back(EchoEvent(i, usage));
  return events;
}

std::string ChatFormat::Event(size_t choice, const ChoiceDelta& delta,
                              const std::optional<TokenUsage>& usage) {
  JsonWriter json(chunk_beginning_);
  json.Key("choices").BeginArray().BeginObject().Key("index").Int(static_cast<int64_t>(choice));
  WriteDelta(delta.message, json);
  WriteLogprobs(delta, json);
  WriteFinishReason(delta, json);
  if (!delta.finish_reason.empty()) WriteStopReason(delta, json);
  json.Key("token_ids");
  WriteTokenIds(options_.return_token_ids ? &delta.token_ids : nullptr, json);
  EndChoice(usage, json);
  json.EndObject();
  return json.Take();
}

std::string ChatFormat::UsageEvent(const TokenUsage& usage) {
  JsonWriter json(chunk_beginning_);
  json.Key("choices").BeginArray().EndArray().Key("usage");
  WriteUsageWithDetails(usage, json);
  json.EndObject();
  return json.Take();
}

}  // namespace fathom
