#include "worker/grammar_masks.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "grammar/protocol.h"
#include "proto/grammar_fault.h"

namespace fathom {

GrammarMasks::GrammarMasks(GrammarKeeper* keeper, int vocab_size, int max_sequences)
    : keeper_(keeper), vocab_size_(vocab_size), constraints_(max_sequences) {}

void GrammarMasks::Admit(int slot, const SamplingParams& params,
                         absl::Span<const int32_t> output_token_ids) {
  if (!params.grammar.has_value()) return;
  Constraint& constraint = constraints_[slot].emplace(Constraint{.grammar = *params.grammar});
  if (keeper_ == nullptr) {
    constraint.failure = absl::InternalError("this worker has no grammars");
    return;
  }
  absl::Span<const int32_t> token_ids = output_token_ids;
  constraint.begins_after = params.grammar_begins_after;
  if (constraint.begins_after.has_value()) {
    const auto before = std::find(token_ids.begin(), token_ids.end(), *constraint.begins_after);
    if (before != token_ids.end()) {
      constraint.begins_after.reset();
    } else {
      constraint.until_then = AllBut(params.stop_token_ids, *constraint.begins_after);
    }
    token_ids.remove_prefix(std::min<size_t>(before - token_ids.begin() + 1, token_ids.size()));
  }
  constraint.token_ids.assign(token_ids.begin(), token_ids.end());
  // Also for one that begins later: what it needs stays from now on.
  Match(constraint);
}

std::vector<uint32_t> GrammarMasks::AllBut(const std::vector<int32_t>& stop_token_ids,
                                           int32_t kept) const {
  std::vector<uint32_t> mask(GrammarMaskWords(vocab_size_), ~uint32_t{0});
  for (const int32_t token_id : stop_token_ids) {
    if (token_id != kept) mask[token_id / 32] &= ~(uint32_t{1} << token_id % 32);
  }
  return mask;
}

void GrammarMasks::Match(Constraint& constraint) {
  absl::StatusOr<std::unique_ptr<GrammarMatcher>> matcher =
      keeper_->Match(constraint.grammar, constraint.token_ids);
  if (matcher.ok()) {
    constraint.matcher = *std::move(matcher);
  } else if (absl::IsNotFound(matcher.status()) && constraint.preparation == nullptr) {
    constraint.preparation = keeper_->PrepareSoon(constraint.grammar);
  } else {
    constraint.failure = matcher.status();
  }
}

absl::Status GrammarMasks::AwaitMatcher(Constraint& constraint) {
  if (constraint.matcher == nullptr && constraint.failure.ok()) {
    constraint.failure = constraint.preparation->Await(keeper_->mask_timeout());
    if (constraint.failure.ok()) Match(constraint);
  }
  return constraint.failure;
}

void GrammarMasks::Release(int slot) { constraints_[slot].reset(); }

absl::StatusOr<absl::Span<const uint32_t>> GrammarMasks::MaskOf(int slot) {
  if (!constraints_[slot].has_value()) return absl::Span<const uint32_t>();
  Constraint& constraint = *constraints_[slot];
  absl::Status failure = constraint.failure;
  if (failure.ok() && constraint.begins_after.has_value()) return constraint.until_then;
  if (failure.ok()) failure = AwaitMatcher(constraint);
  if (failure.ok()) {
    absl::StatusOr<absl::Span<const uint32_t>> mask = constraint.matcher->Mask();
    if (mask.ok()) return mask;
    failure = mask.status();
  }
  const std::string reason = absl::StrCat("structured output: ", failure.message());
  if (!absl::IsInvalidArgument(failure)) return absl::InternalError(reason);
  return OfGrammar(absl::InvalidArgumentError(reason));
}

void GrammarMasks::OnToken(int slot, int32_t token_id) {
  if (!constraints_[slot].has_value()) return;
  Constraint& constraint = *constraints_[slot];
  if (constraint.begins_after.has_value()) {
    if (token_id == *constraint.begins_after) constraint.begins_after.reset();
  } else if (constraint.matcher != nullptr) {
    constraint.matcher->Advance(token_id);
  } else {
    constraint.token_ids.push_back(token_id);
  }
}

}  // namespace fathom
