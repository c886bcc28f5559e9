// What tool calls must look like, for a model that must call tools: a grammar in the form that its
// checkpoint writes calls in, and that tool_call_parser.h reads.
//
// The form is xgrammar's structural tag (proto/sampling.proto, KIND_STRUCTURAL_TAG): markers are
// tokens, arguments obey the tool's schema. Nothing stands around the calls. In DSML a parameter
// that may be any string is written as such, one of a few strings too, all others as JSON; a tool
// whose schema is more than a list of properties gets its arguments as one JSON object.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "gateway/text/chat_message.h"
#include "gateway/text/output_markers.h"
#include "gateway/text/output_syntax.h"

namespace fathom {

enum class NumCalls { kOne, kOneOrMore };

// Calls of some of `tools`, at least one. InvalidArgument: the name of a tool that no call can
// carry. FailedPrecondition: the tokenizer lacks a marker.
absl::StatusOr<std::string> ToolCallGrammar(absl::Span<const ChatTool> tools, NumCalls num_calls,
                                            ToolSyntax syntax, const OutputMarkers& markers);

}  // namespace fathom
