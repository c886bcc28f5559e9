// The bytes that a model's tokens stand for, as grammars see them.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace fathom {

// By token id, of the tokenizer.json in `model_directory`. Empty for added tokens (`<think>`,
// `<｜User｜>`): they are marks between texts, and no part of one. Errors of Tokenizer::Load;
// InvalidArgument when there are more than `vocab_size` tokens.
absl::StatusOr<std::vector<std::string>> ReadVocabulary(const std::string& model_directory,
                                                        int vocab_size);

}  // namespace fathom
