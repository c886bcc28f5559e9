// Which sequences obey a grammar, and which tokens each of them may take next. Rank 0 only.
//
// The step path calls it with every token it has chosen, so it is in step with the sequences by
// construction; the masks are computed elsewhere (grammar_keeper.h) while the next step's logits
// are. Whatever goes wrong with a grammar is its sequence's fault, and MaskOf says it.
//
// Not thread-safe; only the thread that runs steps touches it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "grammar/grammar_keeper.h"
#include "worker/sampling_params.h"

namespace fathom {

class GrammarMasks {
 public:
  // `keeper` outlives this; null: nobody may ask for a grammar.
  GrammarMasks(GrammarKeeper* keeper, int vocab_size, int max_sequences);

  // A sequence takes the slot, with the tokens that it has generated already. A grammar that was
  // not prepared, or was forgotten since, is compiled meanwhile.
  void Admit(int slot, const SamplingParams& params, absl::Span<const int32_t> output_token_ids);
  void Release(int slot);

  // For the token to be chosen now: a bit for each token, or empty when all are allowed. Before its
  // grammar begins a sequence may write anything but stop tokens: it must not end without. Valid
  // until OnToken. Waits for what the grammar still needs, for GrammarKeeperOptions::mask_timeout
  // at most. InvalidArgument (IsOfGrammar), Internal: the sequence must end, and why.
  absl::StatusOr<absl::Span<const uint32_t>> MaskOf(int slot);

  // This token was chosen.
  void OnToken(int slot, int32_t token_id);

 private:
  struct Constraint {
    Grammar grammar;
    std::optional<int32_t> begins_after = std::nullopt;  // until that token was chosen
    std::vector<uint32_t> until_then = {};               // what is allowed
    std::unique_ptr<GrammarMatcher> matcher = nullptr;
    // Until there is one:
    std::vector<int32_t> token_ids = {};
    std::shared_ptr<GrammarPreparation> preparation = nullptr;
    absl::Status failure = absl::OkStatus();  // why there is none
  };

  std::vector<uint32_t> AllBut(const std::vector<int32_t>& stop_token_ids, int32_t kept) const;
  void Match(Constraint& constraint);
  absl::Status AwaitMatcher(Constraint& constraint);

  GrammarKeeper* const keeper_;
  const int vocab_size_;
  std::vector<std::optional<Constraint>> constraints_;  // by slot
};

}  // namespace fathom
