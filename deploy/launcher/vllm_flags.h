// The flags of vLLM 0.16 that `fathom serve` has not: they are accepted with a note where what they
// ask for happens anyway, and refused with the reason where it cannot be had. Others are unknown.
//
// Source: vllm/engine/arg_utils.py, entrypoints/openai/cli_args.py (0.16).
#pragma once

#include <optional>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace fathom {

// A flag that asks for what happens anyway.
struct NeedlessFlag {
  const char* name;
  const char* values;  // that ask for it, as "a|b"; others are refused. "": it takes no value
  const char* reason;
};

absl::Span<const NeedlessFlag> NeedlessFlags();

// Why a flag of vLLM's is refused, whatever its value; nullopt: it is none of those.
std::optional<std::string> ReasonToRefuse(absl::string_view flag);

}  // namespace fathom
