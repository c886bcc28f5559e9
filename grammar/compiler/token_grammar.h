// A grammar over the tokens of a vocabulary: xgrammar, behind a fence of ours.
//
// All of xgrammar's exceptions and warnings end here as Statuses. It runs under the limits of
// session.h only. Masks of parser states are computed when they are first needed, and kept: with
// 129,280 tokens and 619 schemas (tools, official test suite) compiling took 18 ms in the mean with
// the process and the first mask, 148 at the longest; a mask 0.2 ms in the median, 1.2 in the mean,
// 17 at the 99th percentile and 80 at the longest, on two cores that others used too
// (grammar_bench). Not thread-safe.
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
  // `bytes_of_id`: by token id; empty: it is no part of a text, and comes only where a structural
  // tag names it. Ids up to `vocab_size` that it lacks never come. `eos_token_ids` may come where
  // the grammar may end.
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
  // The tokens that may come next, without those after which the text were no UTF-8. When it has
  // ended that is the end-of-sequence again: nothing else may follow, whatever ignores it.
  // REQUIRES: `mask` has a bit for each token.
  virtual absl::Status FillMask(absl::Span<uint32_t> mask) = 0;
};

class TokenGrammar {
 public:
  // InvalidArgument: the grammar is wrong, or asks for what xgrammar would leave out, or no text at
  // all obeys it. JSON Schemas, in structural tags too, are checked by schema_check.h first.
  static absl::StatusOr<TokenGrammar> Compile(const TokenVocabulary& vocabulary,
                                              const Grammar& grammar);
  absl::StatusOr<std::unique_ptr<TokenMatcher>> NewMatcher() const;

 private:
  struct Compiled;
  std::shared_ptr<const Compiled> compiled_;
};

}  // namespace fathom
