// The words of /v1/completions. Not thread-safe; one per request.
//
// Source: vllm/entrypoints/openai/completion/{protocol,serving}.py (0.16).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gateway/openai/answer.h"
#include "gateway/openai/json_writer.h"
#include "gateway/openai/model_text.h"
#include "gateway/openai/response_header.h"

namespace fathom {

struct CompletionFormatOptions {
  ResponseHeader header;
  std::vector<std::vector<uint32_t>> prompts;  // token ids, for echo and return_token_ids
  std::vector<std::string> echo_texts;         // [prompt], empty without echo
  size_t num_hidden = 0;  // tokens at the front of each prompt that its echo does not show
  int n = 1;              // choices of each prompt
  bool echo = false;
  bool has_logprobs = false;
  bool has_prompt_logprobs = false;
  bool return_token_ids = false;
};

class CompletionFormat : public AnswerFormat {
 public:
  CompletionFormat(CompletionFormatOptions options, TokenNames names);

  std::string Whole(std::vector<ChoiceDelta> choices, const TokenUsage& usage) override;
  std::vector<std::string> FirstEvents(const std::optional<TokenUsage>& usage) override;
  std::string Event(size_t choice, const ChoiceDelta& delta,
                    const std::optional<TokenUsage>& usage) override;
  std::string UsageEvent(const TokenUsage& usage) override;

 private:
  enum class Part { kOutput, kPromptAndOutput };

  // "index" to "stop_reason".
  void WriteChoice(size_t choice, const ChoiceDelta& delta, Part part, JsonWriter& json);
  void WriteLogprobs(size_t choice, const ChoiceDelta& delta, Part part, JsonWriter& json);

  const CompletionFormatOptions options_;
  const TokenNames names_;
  const std::string beginning_;        // of every answer and event
  std::vector<int64_t> text_offsets_;  // [choice] of the next token
  std::vector<bool> started_;          // [choice]
};

}  // namespace fathom
