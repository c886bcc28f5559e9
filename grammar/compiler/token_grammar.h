// A grammar over the tokens of a vocabulary: xgrammar, behind a fence of ours.
//
// All of xgrammar's exceptions and warnings end here as Statuses. It runs under the limits of
// limited_session.h only. Masks of parser states are computed when they are first needed: compiling
// takes about a millisecond, and each new state up to some ten, for a vocabulary of 129,280 tokens.
// Not thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "grammar/grammar.h"

namespace fathom {

// The bytes of each token of a model. Copies share them.
class TokenVocabulary {
 public:
  // `bytes_of_id`: by token id; empty: no grammar allows the token. Ids up to `vocab_size` that it
  // lacks are such ones too. `eos_token_ids` may come where the grammar may end.
  TokenVocabulary(const std::vector<std::string>& bytes_of_id, int vocab_size,
                  const std::vector<int>& eos_token_ids);

 private:
  friend class TokenGrammar;
  struct Info;
  std::shared_ptr<const Info> info_;
};

// A place in a grammar.
class TokenMatcher {
 public:
  virtual ~TokenMatcher() = default;
  // False: the grammar does not allow the token here. The end-of-sequence ends the grammar; after
  // it everything is accepted.
  virtual absl::StatusOr<bool> Accept(int32_t token_id) = 0;
  virtual bool HasEnded() const = 0;
  // The tokens that may come next, without those after which the text were no UTF-8.
  // REQUIRES: it has not ended, and `mask` has a bit for each token.
  virtual absl::Status FillMask(absl::Span<uint32_t> mask) = 0;
};

class TokenGrammar {
 public:
  // InvalidArgument: the grammar is wrong, or asks for what xgrammar would leave out, or no text at
  // all obeys it. JSON Schemas are checked by schema_check.h first.
  static absl::StatusOr<TokenGrammar> Compile(const TokenVocabulary& vocabulary,
                                              const Grammar& grammar);
  absl::StatusOr<std::unique_ptr<TokenMatcher>> NewMatcher() const;

 private:
  struct Compiled;
  std::shared_ptr<const Compiled> compiled_;
};

}  // namespace fathom
