#include "grammar/compiler/vocabulary.h"

#include <memory>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "gateway/text/tokenizer.h"

namespace fathom {

absl::StatusOr<std::vector<std::string>> ReadVocabulary(const std::string& model_directory,
                                                        int vocab_size) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer, Tokenizer::Load(model_directory));
  if (tokenizer->vocab_size() > static_cast<uint32_t>(vocab_size)) {
    return absl::InvalidArgumentError(absl::StrCat("the tokenizer has ", tokenizer->vocab_size(),
                                                   " tokens, the model ", vocab_size));
  }
  std::vector<std::string> bytes_of_id(tokenizer->vocab_size());
  for (uint32_t id = 0; id < tokenizer->vocab_size(); ++id) {
    const std::string_view bytes = tokenizer->BytesOf(id);
    if (tokenizer->IsSpecial(id) || tokenizer->FindAddedToken(bytes) == id) continue;
    bytes_of_id[id] = std::string(bytes);
  }
  return bytes_of_id;
}

}  // namespace fathom
