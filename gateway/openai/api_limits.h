// What one request may ask for. Each limit is a flag of fathom-gateway; beyond it is a 400 that
// names the limit. The token limits follow proto/sampling.proto, where the coordinator checks them
// again.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fathom {

struct ApiLimits {
  size_t json_depth = 64;
  size_t messages = 2'048;
  int64_t n = 128;
  size_t prompts = 128;
  size_t choices = 256;  // prompts × n
  size_t stop_strings = 16;
  size_t stop_string_bytes = 1'024;
  size_t stop_token_ids = 128;
  size_t allowed_token_ids = 8'192;
  size_t bad_words = 256;  // each becomes at most two sequences of tokens
  size_t bad_word_bytes = 256;
  size_t logit_bias_entries = 1'024;
  int64_t logprobs = 20;
};

}  // namespace fathom
