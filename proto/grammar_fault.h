// Whether a request was refused for its grammar, and not for another of its fields: a mark that
// goes with a status, through gRPC as StreamFailure.is_of_grammar. Thread-safe (pure functions).
#pragma once

#include "absl/status/status.h"
#include "absl/strings/cord.h"

namespace fathom {

inline constexpr char kOfGrammar[] = "fathom/of-grammar";  // the name of a status's payload

// The same, marked. Does nothing to a status that is OK.
inline absl::Status OfGrammar(absl::Status status) {
  status.SetPayload(kOfGrammar, absl::Cord());
  return status;
}

inline bool IsOfGrammar(const absl::Status& status) {
  return status.GetPayload(kOfGrammar).has_value();
}

}  // namespace fathom
