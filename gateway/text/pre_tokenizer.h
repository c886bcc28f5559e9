// Cuts text into the words that byte-pair encoding works on, as DeepSeek-V3's tokenizer does.
//
// tokenizer.json states the cuts as three regular expressions, applied one after another, each to
// the pieces the one before left:
//
//   1. \p{N}{1,3}                digits, at most three together
//   2. [一-龥぀-ゟ゠-ヿ]+         Chinese and Japanese
//   3. what kDeepSeekV3Words says  words with the character before them, signs, white space
//
// What an expression does not match stays as a piece. Here they are one scan in linear time; a
// regular expression engine is neither needed nor trusted with text from a client.
// Thread-safe (pure functions).
// Source: tokenizer.json of deepseek-ai/DeepSeek-V3; huggingface/tokenizers pre_tokenizers/split.
#pragma once

#include <string_view>

#include "absl/functional/function_ref.h"

namespace fathom {

inline constexpr std::string_view kDeepSeekV3Numbers = R"(\p{N}{1,3})";
inline constexpr std::string_view kDeepSeekV3Ideographs =
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+";
inline constexpr std::string_view kDeepSeekV3Words =
    R"([!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+)"
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*"
    R"(|\s*[)"
    "\r\n"
    R"(]+|\s+(?!\S)|\s+)";

// Calls `word` for each word of `text` (valid UTF-8) in order; joined they are `text`. The views
// point into `text`.
void PreTokenizeDeepSeekV3(std::string_view text, absl::FunctionRef<void(std::string_view)> word);

}  // namespace fathom
