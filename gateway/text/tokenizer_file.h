// Reads tokenizer.json and tokenizer_config.json, and refuses what this tokenizer would get wrong.
//
// The files come with a checkpoint from anywhere: nothing in them is trusted. Every error is
// InvalidArgument and names the file, the field and the value. Thread-safe (pure functions).
// Source: huggingface/tokenizers (the format of tokenizer.json), transformers (the other).
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "gateway/text/added_tokens.h"
#include "gateway/text/byte_pair_encoder.h"

namespace fathom {

inline constexpr size_t kMaxTokenizerFileBytes = size_t{256} << 20;
inline constexpr uint32_t kMaxTokenizerIds = 1 << 22;
inline constexpr size_t kMaxTokenBytes = 1 << 16;

// A tokenizer.json that we can tokenize exactly as its authors do.
struct TokenizerFile {
  std::vector<std::string> bytes_of_id;        // [id]; every id below its size is a token's
  std::array<uint32_t, 256> byte_ids;          // the token of each single byte
  std::vector<BytePairEncoder::Token> words;   // model.vocab, without what bytes cannot spell
  std::vector<BytePairEncoder::Merge> merges;  // model.merges, best first
  std::vector<AddedToken> added_tokens;
  absl::flat_hash_map<std::string, uint32_t> ids;  // of model.vocab, as spelled in the file

  // What a TemplateProcessing post-processor puts around one text.
  std::vector<uint32_t> template_prefix;
  std::vector<uint32_t> template_suffix;
};

absl::StatusOr<TokenizerFile> ParseTokenizerFile(std::string_view json);

// The part of tokenizer_config.json that changes ids. nullopt: the file does not say.
struct TokenizerConfig {
  std::optional<bool> add_bos_token;
  std::optional<bool> add_eos_token;
  std::optional<std::string> bos_token;  // the text of the token
  std::optional<std::string> eos_token;
  std::string chat_template;  // the one named "default" where there are several
};

absl::StatusOr<TokenizerConfig> ParseTokenizerConfig(std::string_view json);

}  // namespace fathom
