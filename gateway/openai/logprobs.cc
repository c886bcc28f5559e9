#include "gateway/openai/logprobs.h"

#include <algorithm>
#include <string>
#include <string_view>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"

namespace fathom {
namespace {

constexpr float kLowestLogprob = -9999.0f;

float Clamped(float logprob) { return std::max(logprob, kLowestLogprob); }

void WriteBytes(std::string_view bytes, JsonWriter& json) {
  json.BeginArray();
  for (const char byte : bytes) json.Int(static_cast<uint8_t>(byte));
  json.EndArray();
}

// Two tokens can have the same name (halves of characters do): the better one keeps it.
void WriteTopMap(const v1::TokenLogprobs& logprobs, const TokenNames& names, JsonWriter& json) {
  absl::flat_hash_set<std::string> written;
  json.BeginObject();
  const auto write = [&](uint32_t token_id, float logprob) {
    std::string name = names.NameOf(token_id);
    if (!written.insert(name).second) return;
    json.Key(name).Float(Clamped(logprob));
  };
  write(logprobs.token_id(), logprobs.logprob());
  for (int i = 0; i < logprobs.top_token_ids_size(); ++i) {
    write(logprobs.top_token_ids(i), logprobs.top_logprobs(i));
  }
  json.EndObject();
}

void WriteChatToken(uint32_t token_id, float logprob, const TokenNames& names, JsonWriter& json) {
  json.Key("token").String(names.NameOf(token_id));
  json.Key("logprob").Float(Clamped(logprob));
  json.Key("bytes");
  WriteBytes(names.BytesOf(token_id), json);
}

// Characters of UTF-8 text.
int64_t CountCharacters(std::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; });
}

}  // namespace

int64_t WriteCompletionLogprobs(absl::Span<const TokenRecord> tokens, int64_t first_offset,
                                const TokenNames& names, JsonWriter& json) {
  json.BeginObject().Key("text_offset").BeginArray();
  int64_t offset = first_offset;
  for (const TokenRecord& token : tokens) {
    json.Int(offset);
    if (token.is_in_text) offset += CountCharacters(names.NameOf(token.token_id));
  }
  json.EndArray().Key("token_logprobs").BeginArray();
  for (const TokenRecord& token : tokens) {
    if (token.logprobs == nullptr) {
      json.Null();
    } else {
      json.Float(Clamped(token.logprobs->logprob()));
    }
  }
  json.EndArray().Key("tokens").BeginArray();
  for (const TokenRecord& token : tokens) json.String(names.NameOf(token.token_id));
  json.EndArray().Key("top_logprobs").BeginArray();
  for (const TokenRecord& token : tokens) {
    if (token.logprobs == nullptr) {
      json.Null();
    } else {
      WriteTopMap(*token.logprobs, names, json);
    }
  }
  json.EndArray().EndObject();
  return offset;
}

void WriteChatLogprobs(absl::Span<const TokenRecord> tokens, const TokenNames& names,
                       JsonWriter& json) {
  json.BeginObject().Key("content");
  WriteLogprobList(tokens, names, json);
  json.EndObject();
}

void WriteLogprobList(absl::Span<const TokenRecord> tokens, const TokenNames& names,
                      JsonWriter& json) {
  json.BeginArray();
  for (const TokenRecord& token : tokens) {
    const v1::TokenLogprobs& logprobs = *token.logprobs;
    json.BeginObject();
    WriteChatToken(token.token_id, logprobs.logprob(), names, json);
    json.Key("top_logprobs").BeginArray();
    for (int i = 0; i < logprobs.top_token_ids_size(); ++i) {
      json.BeginObject();
      WriteChatToken(logprobs.top_token_ids(i), logprobs.top_logprobs(i), names, json);
      json.EndObject();
    }
    json.EndArray().EndObject();
  }
  json.EndArray();
}

void WritePromptLogprobs(absl::Span<const v1::TokenLogprobs> prompt_logprobs,
                         const TokenNames& names, JsonWriter& json) {
  json.BeginArray().Null();
  for (const v1::TokenLogprobs& logprobs : prompt_logprobs) {
    json.BeginObject();
    const auto write = [&](uint32_t token_id, float logprob, int64_t rank) {
      json.Key(absl::StrCat(token_id)).BeginObject();
      json.Key("logprob").Float(Clamped(logprob)).Key("rank").Int(rank).Key("decoded_token");
      if (names.has_text()) {
        json.String(names.TextOf(token_id));
      } else {
        json.Null();
      }
      json.EndObject();
    };
    write(logprobs.token_id(), logprobs.logprob(), logprobs.rank());
    for (int i = 0; i < logprobs.top_token_ids_size(); ++i) {
      if (logprobs.top_token_ids(i) == logprobs.token_id()) continue;
      write(logprobs.top_token_ids(i), logprobs.top_logprobs(i), i + 1);
    }
    json.EndObject();
  }
  json.EndArray();
}

}  // namespace fathom
