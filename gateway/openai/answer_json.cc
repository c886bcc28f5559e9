#include "gateway/openai/answer_json.h"

#include <string>
#include <variant>

namespace fathom {
namespace {

void WriteUsageFields(const TokenUsage& usage, JsonWriter& json) {
  json.Key("prompt_tokens").Int(usage.prompt_tokens);
  json.Key("total_tokens").Int(usage.prompt_tokens + usage.completion_tokens);
  json.Key("completion_tokens").Int(usage.completion_tokens);
}

}  // namespace

void WriteFinishReason(const ChoiceDelta& delta, JsonWriter& json) {
  json.Key("finish_reason");
  if (delta.finish_reason.empty()) {
    json.Null();
  } else {
    json.String(delta.finish_reason);
  }
}

void WriteStopReason(const ChoiceDelta& delta, JsonWriter& json) {
  json.Key("stop_reason");
  if (const std::string* string = std::get_if<std::string>(&delta.stop_reason)) {
    json.String(*string);
  } else if (const uint32_t* token_id = std::get_if<uint32_t>(&delta.stop_reason)) {
    json.Int(*token_id);
  } else {
    json.Null();
  }
}

void WriteTokenIds(const std::vector<uint32_t>* token_ids, JsonWriter& json) {
  if (token_ids == nullptr) {
    json.Null();
    return;
  }
  json.BeginArray();
  for (const uint32_t token_id : *token_ids) json.Int(token_id);
  json.EndArray();
}

void WriteUsage(const TokenUsage& usage, JsonWriter& json) {
  json.BeginObject();
  WriteUsageFields(usage, json);
  json.EndObject();
}

void WriteUsageWithDetails(const TokenUsage& usage, JsonWriter& json) {
  json.BeginObject();
  WriteUsageFields(usage, json);
  json.Key("prompt_tokens_details").BeginObject();
  json.Key("cached_tokens").Int(usage.cached_tokens).EndObject().EndObject();
}

}  // namespace fathom
