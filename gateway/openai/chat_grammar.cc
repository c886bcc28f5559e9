#include "gateway/openai/chat_grammar.h"

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "gateway/openai/errors.h"
#include "gateway/openai/structured_output.h"
#include "gateway/text/tool_call_grammar.h"

namespace fathom {

absl::Status FitGrammar(ChatRequest& request, const ModelText& text) {
  const OutputMarkers& markers = text.output_markers();
  const OutputSyntax& syntax = text.chat_encoder().layout().syntax;
  std::optional<StructuredOutput>& output = request.parameters.structured_output;
  if (!request.required_tools.empty()) {
    const NumCalls num_calls =
        request.tool_calls == ToolCalls::kOne ? NumCalls::kOne : NumCalls::kOneOrMore;
    absl::StatusOr<std::string> calls =
        ToolCallGrammar(request.required_tools, num_calls, syntax.tools, markers);
    if (!calls.ok()) return InvalidParameter("tools", std::string(calls.status().message()));
    output.emplace().param = "tools";
    output->grammar.set_kind(v1::Grammar::KIND_STRUCTURAL_TAG);
    output->grammar.set_text(*std::move(calls));
  }
  if (!output) return absl::OkStatus();

  const std::optional<uint32_t> think = markers.TokenOf(Marker::kThink);
  const std::optional<uint32_t> think_end = markers.TokenOf(Marker::kThinkEnd);
  if (think_end.has_value() &&
      text.chat_encoder().EndsInThinking(request.prompt.messages, request.prompt.options)) {
    output->grammar.set_begins_after_token_id(*think_end);
  } else if (syntax.thinking == ThinkSyntax::kMayThink && think.has_value() &&
             think_end.has_value()) {
    std::vector<uint32_t> no_thoughts;
    for (const Marker marker : {Marker::kThink, Marker::kCallsBegin, Marker::kCallsEnd,
                                Marker::kCallBegin, Marker::kSeparator, Marker::kCallEnd}) {
      if (const auto token_id = markers.TokenOf(marker)) no_thoughts.push_back(*token_id);
    }
    output->grammar = MayThinkFirst(output->grammar, *think, *think_end, no_thoughts);
  }
  if (output->grammar.text().size() > kMaxGrammarBytes) {
    return InvalidParameter(
        output->param,
        absl::StrCat("what the answer must look like takes ", output->grammar.text().size(),
                     " bytes to say, limit ", kMaxGrammarBytes, "."));
  }
  return absl::OkStatus();
}

}  // namespace fathom
