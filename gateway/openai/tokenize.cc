#include "gateway/openai/tokenize.h"

#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "gateway/openai/answer_json.h"
#include "gateway/openai/chat_completions.h"
#include "gateway/openai/errors.h"
#include "gateway/openai/json_fields.h"
#include "gateway/openai/model_limits.h"
#include "gateway/text/detokenizer.h"

namespace fathom {
namespace {

namespace dom = simdjson::dom;

// The character that GPT-2's byte-level BPE writes for each byte.
std::array<uint16_t, 256> ByteCharacters() {
  std::array<uint16_t, 256> characters{};
  uint16_t next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable =
        (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    characters[byte] = printable ? static_cast<uint16_t>(byte) : next++;
  }
  return characters;
}

// `character` is below U+0800.
void AppendUtf8(uint16_t character, std::string& text) {
  if (character < 0x80) {
    text += static_cast<char>(character);
  } else {
    text += static_cast<char>(0xC0 | character >> 6);
    text += static_cast<char>(0x80 | (character & 0x3F));
  }
}

absl::StatusOr<TokenizeRequest> ParseTokenizeRequest(std::string_view body,
                                                     const ApiLimits& limits) {
  ASSIGN_OR_RETURN(const JsonDocument document, JsonDocument::Parse(body, limits.json_depth));
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(document.root(), ""));
  TokenizeRequest request;
  RETURN_IF_ERROR(fields.Read("model", request.model));
  RETURN_IF_ERROR(fields.Read("prompt", request.prompt));
  bool add_special_tokens = true;
  RETURN_IF_ERROR(fields.Read("add_special_tokens", add_special_tokens));
  if (!add_special_tokens) request.bos_policy = BosPolicy::kNone;
  RETURN_IF_ERROR(fields.Read("return_token_strs", request.return_token_strs));
  const bool has_messages = fields.Find("messages").has_value();
  if (request.prompt && has_messages) {
    return MalformedRequest("prompt", "prompt and messages cannot both be given");
  }
  if (request.prompt) return request;
  if (!has_messages) {
    return MalformedRequest("prompt", "either prompt or messages must be given");
  }
  ASSIGN_OR_RETURN(request.chat, ReadChatPrompt(fields, limits));
  return request;
}

absl::StatusOr<DetokenizeRequest> ParseDetokenizeRequest(std::string_view body,
                                                         const ApiLimits& limits) {
  ASSIGN_OR_RETURN(const JsonDocument document, JsonDocument::Parse(body, limits.json_depth));
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(document.root(), ""));
  DetokenizeRequest request;
  RETURN_IF_ERROR(fields.Read("model", request.model));
  const std::optional<dom::element> tokens = fields.Find("tokens");
  dom::array ids;
  if (!tokens || tokens->get(ids)) return fields.WrongType("tokens", "a list of token ids");
  RETURN_IF_ERROR(fields.ReadTokenIds("tokens", ids, request.tokens));
  return request;
}

Task<> SendResult(absl::StatusOr<std::string> body, ResponseWriter& writer) {
  Response response;
  if (body.ok()) {
    response.body = *std::move(body);
  } else {
    response = ErrorResponse(body.status());
  }
  co_await writer.Send(std::move(response));
}

}  // namespace

std::string VocabularyEntryOf(const Tokenizer& tokenizer, uint32_t token_id) {
  static const std::array<uint16_t, 256> characters = ByteCharacters();
  const std::string bytes(tokenizer.BytesOf(token_id));
  if (tokenizer.FindAddedToken(bytes) == token_id) return bytes;
  std::string entry;
  for (const char byte : bytes) AppendUtf8(characters[static_cast<uint8_t>(byte)], entry);
  return entry;
}

absl::StatusOr<TokenizeRequest> TokenizeHandler::Parse(const HttpRequest& request) const {
  RETURN_IF_ERROR(CheckJsonContent(request));
  ASSIGN_OR_RETURN(TokenizeRequest parsed, ParseTokenizeRequest(request.body, api_.limits));
  RETURN_IF_ERROR(api_.model.CheckName(parsed.model));
  if (parsed.chat) {
    RETURN_IF_ERROR(api_.text.CheckHasChat());
  } else {
    RETURN_IF_ERROR(api_.text.CheckHasText("prompt"));
  }
  return parsed;
}

Task<absl::StatusOr<std::string>> TokenizeHandler::Tokenize(const HttpRequest& http_request) {
  const size_t num_bytes = http_request.body.size();
  absl::StatusOr<TokenizeRequest> request;
  const auto parse = [&] { request = Parse(http_request); };
  co_await api_.text_threads.RunIfMuch(num_bytes, parse);
  if (!request.ok()) co_return request.status();
  const Tokenizer& tokenizer = *api_.text.tokenizer();
  absl::StatusOr<std::vector<uint32_t>> token_ids = std::vector<uint32_t>();
  if (request->chat) {
    token_ids = co_await EncodeChat(*request->chat, num_bytes, api_.text, api_.text_threads);
    if (!token_ids.ok()) co_return token_ids.status();
  } else {
    const auto encode = [&] {
      *token_ids = tokenizer.Encode(*request->prompt, request->bos_policy);
    };
    co_await api_.text_threads.Run(num_bytes, encode);
  }
  const absl::StatusOr<v1::ModelInfo> info = co_await api_.model.Info();
  if (!info.ok()) co_return info.status();

  JsonWriter json;
  const auto write = [&] {
    json.BeginObject().Key("count").Int(static_cast<int64_t>(token_ids->size()));
    json.Key("max_model_len").Int(info->max_model_len()).Key("tokens");
    WriteTokenIds(&*token_ids, json);
    json.Key("token_strs");
    if (request->return_token_strs) {
      json.BeginArray();
      for (const uint32_t id : *token_ids) json.String(VocabularyEntryOf(tokenizer, id));
      json.EndArray();
    } else {
      json.Null();
    }
    json.EndObject();
  };
  co_await api_.text_threads.RunIfMuch(num_bytes, write);
  co_return json.Take();
}

Task<> TokenizeHandler::Handle(const HttpRequest& request, ResponseWriter& writer) {
  absl::StatusOr<std::string> body = co_await Tokenize(request);
  co_await SendResult(std::move(body), writer);
}

absl::StatusOr<DetokenizeRequest> DetokenizeHandler::Parse(const HttpRequest& request) const {
  RETURN_IF_ERROR(CheckJsonContent(request));
  ASSIGN_OR_RETURN(DetokenizeRequest parsed, ParseDetokenizeRequest(request.body, api_.limits));
  RETURN_IF_ERROR(api_.model.CheckName(parsed.model));
  RETURN_IF_ERROR(api_.text.CheckHasText("tokens"));
  return parsed;
}

Task<absl::StatusOr<std::string>> DetokenizeHandler::Detokenize(const HttpRequest& http_request) {
  const size_t num_bytes = http_request.body.size();
  absl::StatusOr<DetokenizeRequest> request;
  const auto parse = [&] { request = Parse(http_request); };
  co_await api_.text_threads.RunIfMuch(num_bytes, parse);
  if (!request.ok()) co_return request.status();
  const absl::StatusOr<v1::ModelInfo> info = co_await api_.model.Info();
  if (!info.ok()) co_return info.status();
  const absl::Status in_vocabulary = CheckInVocabulary("tokens", request->tokens, *info);
  if (!in_vocabulary.ok()) co_return in_vocabulary;
  JsonWriter json;
  const auto write = [&] {
    json.BeginObject().Key("prompt");
    json.String(Decode(*api_.text.tokenizer(), request->tokens, {.skip_special_tokens = false}));
    json.EndObject();
  };
  co_await api_.text_threads.RunIfMuch(num_bytes, write);
  co_return json.Take();
}

absl::StatusOr<std::string> TokenizerInfoHandler::Describe() const {
  RETURN_IF_ERROR(api_.text.CheckHasText("tokenizer"));
  const Tokenizer& tokenizer = *api_.text.tokenizer();
  JsonWriter json;
  const auto write = [&](std::string_view key, std::optional<uint32_t> token_id) {
    json.Key(key);
    if (token_id) {
      json.String(tokenizer.BytesOf(*token_id));
    } else {
      json.Null();
    }
  };
  json.BeginObject().Key("tokenizer_class").String("PreTrainedTokenizerFast");
  write("bos_token", tokenizer.bos());
  write("eos_token", tokenizer.eos());
  json.Key("pad_token").Null().Key("vocab_size").Int(tokenizer.vocab_size()).EndObject();
  return json.Take();
}

Task<> TokenizerInfoHandler::Handle(const HttpRequest&, ResponseWriter& writer) {
  absl::StatusOr<std::string> body = Describe();
  co_await SendResult(std::move(body), writer);
}

Task<> DetokenizeHandler::Handle(const HttpRequest& request, ResponseWriter& writer) {
  absl::StatusOr<std::string> body = co_await Detokenize(request);
  co_await SendResult(std::move(body), writer);
}

}  // namespace fathom
