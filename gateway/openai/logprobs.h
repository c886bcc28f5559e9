// Log-probabilities in the shapes of the APIs. JSON has no infinity: nothing is below -9999.
//
// Sources: OpenAI's API reference (Completions and Chat, `logprobs`); vllm/entrypoints/openai.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/types/span.h"
#include "gateway/openai/json_writer.h"
#include "gateway/openai/model_text.h"
#include "proto/sampling.pb.h"

namespace fathom {

struct TokenRecord {
  uint32_t token_id = 0;
  // Null for the first token of a prompt, which has none.
  const v1::TokenLogprobs* logprobs = nullptr;
  // False: it was added to the client's text, which does not show it.
  bool is_in_text = true;
};

// {"text_offset":[…],"token_logprobs":[…],"tokens":[…],"top_logprobs":[{token: logprob, …}, …]}
// Offsets count the characters of the tokens' names as far as they are in the text, from
// `first_offset`; returns the one after the last. Each map holds the token itself first, then the
// best ones.
int64_t WriteCompletionLogprobs(absl::Span<const TokenRecord> tokens, int64_t first_offset,
                                const TokenNames& names, JsonWriter& json);

// {"content":[{"token":…,"logprob":…,"bytes":[…],"top_logprobs":[…]}, …]}
void WriteChatLogprobs(absl::Span<const TokenRecord> tokens, const TokenNames& names,
                       JsonWriter& json);

// The list of the above.
void WriteLogprobList(absl::Span<const TokenRecord> tokens, const TokenNames& names,
                      JsonWriter& json);

// [null, {"ID":{"logprob":…,"rank":…,"decoded_token":…}, …}, …]: the prompt's tokens, the first of
// which has none, each with its best ones.
void WritePromptLogprobs(absl::Span<const v1::TokenLogprobs> prompt_logprobs,
                         const TokenNames& names, JsonWriter& json);

}  // namespace fathom
