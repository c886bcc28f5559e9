// POST /tokenize, POST /detokenize and GET /tokenizer_info.
//
// Source: vllm/entrypoints/serve/tokenize (0.16).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gateway/http/handler.h"
#include "gateway/openai/api.h"
#include "gateway/openai/chat_request.h"
#include "gateway/text/tokenizer.h"

namespace fathom {

struct TokenizeRequest {
  std::optional<std::string> model;
  std::optional<std::string> prompt;  // this or chat
  std::optional<ChatPrompt> chat;
  BosPolicy bos_policy = BosPolicy::kAsConfigured;  // of prompt
  bool return_token_strs = false;
};

struct DetokenizeRequest {
  std::optional<std::string> model;
  std::vector<uint32_t> tokens;
};

// {prompt, add_special_tokens=true} or {messages, add_special_tokens=false, …}, and
// return_token_strs=false, to {count, max_model_len, tokens, token_strs}.
class TokenizeHandler : public Handler {
 public:
  explicit TokenizeHandler(const Api& api) : api_(api) {}
  Task<> Handle(const HttpRequest& request, ResponseWriter& writer) override;

 private:
  absl::StatusOr<TokenizeRequest> Parse(const HttpRequest& request) const;
  Task<absl::StatusOr<std::string>> Tokenize(const HttpRequest& request);

  Api api_;
};

// {tokens} to {prompt}, special tokens included.
class DetokenizeHandler : public Handler {
 public:
  explicit DetokenizeHandler(const Api& api) : api_(api) {}
  Task<> Handle(const HttpRequest& request, ResponseWriter& writer) override;

 private:
  absl::StatusOr<DetokenizeRequest> Parse(const HttpRequest& request) const;
  Task<absl::StatusOr<std::string>> Detokenize(const HttpRequest& request);

  Api api_;
};

// {bos_token, eos_token, …}: what clients that tokenize here, not by themselves, need to know
// (lm-eval's remote tokenizer does).
class TokenizerInfoHandler : public Handler {
 public:
  explicit TokenizerInfoHandler(const Api& api) : api_(api) {}
  Task<> Handle(const HttpRequest& request, ResponseWriter& writer) override;

 private:
  absl::StatusOr<std::string> Describe() const;

  Api api_;
};

// The token as its vocabulary entry spells it: byte-level BPE writes a byte that is no printable
// ASCII or Latin-1 character as one above U+0100 ("Ġhello" for " hello"); special tokens are their
// own text.
std::string VocabularyEntryOf(const Tokenizer& tokenizer, uint32_t token_id);

}  // namespace fathom
