// What a client asked for, after validation. Never changes afterwards.
//
// Invariants, established by ValidateRequest (request_validation.h):
//   - the prompt has at least one token, every token id is below the vocabulary size;
//   - prompt and output together fit into the model's length and into the KV cache;
//   - `sampling.seed` is set, and every number of `sampling` is in range.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "proto/sampling.pb.h"

namespace fathom {

struct Request {
  std::string label;  // the client's name for it, for logs only; may be empty or not unique
  std::vector<uint32_t> prompt_token_ids;
  int max_tokens = 0;  // 0: only the prompt is read
  int min_tokens = 0;  // no stop token counts before that many have been generated
  bool wants_prompt_logprobs = false;
  int priority = 0;                // lower first; among equals, who came first
  int max_queue_milliseconds = 0;  // for it to be admitted the first time; 0: any
  std::string cache_salt;  // requests share KV with those of the same salt only; may be empty

  // Tokens that end the request, each sorted. End-of-sequence comes first where both hold an id.
  std::vector<uint32_t> eos_token_ids;   // the model's; empty when the client ignores them
  std::vector<uint32_t> stop_token_ids;  // the client's

  // As the workers get it: seed set, and stop_token_ids those of both lists above.
  v1::SamplingParams sampling;

  int num_prompt_tokens() const { return static_cast<int>(prompt_token_ids.size()); }
  int max_total_tokens() const { return num_prompt_tokens() + max_tokens; }
};

}  // namespace fathom
