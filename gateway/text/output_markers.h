// The tokens with which a model marks thoughts and tool calls, by id: the same text spelled with
// other tokens is text.
#pragma once

#include <cstdint>
#include <optional>

#include "absl/container/flat_hash_map.h"
#include "gateway/text/output_syntax.h"
#include "gateway/text/tokenizer.h"

namespace fathom {

enum class Marker {
  kThink,
  kThinkEnd,
  kCallsBegin,
  kCallsEnd,
  kCallBegin,
  kSeparator,  // within a call: what follows is the name, or the arguments
  kCallEnd,
  kDsml,
};

// Immutable: any thread.
class OutputMarkers {
 public:
  // Those of `syntax` that the tokenizer has.
  OutputMarkers(const Tokenizer& tokenizer, OutputSyntax syntax);

  std::optional<Marker> Find(uint32_t token_id) const;
  std::optional<uint32_t> TokenOf(Marker marker) const;

 private:
  absl::flat_hash_map<uint32_t, Marker> markers_;
};

}  // namespace fathom
