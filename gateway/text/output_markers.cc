#include "gateway/text/output_markers.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "absl/types/span.h"
#include "gateway/text/deepseek_markers.h"

namespace fathom {
namespace {

using Token = std::pair<std::string_view, Marker>;

constexpr Token kThinkTokens[] = {{deepseek::kThink, Marker::kThink},
                                  {deepseek::kThinkEnd, Marker::kThinkEnd}};
constexpr Token kDeepSeekTokens[] = {{deepseek::kCallsBegin, Marker::kCallsBegin},
                                     {deepseek::kCallsEnd, Marker::kCallsEnd},
                                     {deepseek::kCallBegin, Marker::kCallBegin},
                                     {deepseek::kSeparator, Marker::kSeparator},
                                     {deepseek::kCallEnd, Marker::kCallEnd}};
constexpr Token kDsmlTokens[] = {{deepseek::kDsml, Marker::kDsml}};
constexpr Token kKimiTokens[] = {{"<|tool_calls_section_begin|>", Marker::kCallsBegin},
                                 {"<|tool_calls_section_end|>", Marker::kCallsEnd},
                                 {"<|tool_call_begin|>", Marker::kCallBegin},
                                 {"<|tool_call_argument_begin|>", Marker::kSeparator},
                                 {"<|tool_call_end|>", Marker::kCallEnd}};

absl::Span<const Token> TokensOf(ToolSyntax syntax) {
  switch (syntax) {
    case ToolSyntax::kV3:
    case ToolSyntax::kV31:
      return kDeepSeekTokens;
    case ToolSyntax::kDsml:
      return kDsmlTokens;
    case ToolSyntax::kKimiK2:
      return kKimiTokens;
  }
  return {};
}

}  // namespace

OutputMarkers::OutputMarkers(const Tokenizer& tokenizer, OutputSyntax syntax) {
  const auto add = [&](absl::Span<const Token> tokens) {
    for (const auto& [text, marker] : tokens) {
      const std::optional<uint32_t> id = tokenizer.FindAddedToken(text);
      if (id.has_value()) markers_[*id] = marker;
    }
  };
  add(TokensOf(syntax.tools));
  if (syntax.thinking != ThinkSyntax::kNone) add(kThinkTokens);
}

std::optional<Marker> OutputMarkers::Find(uint32_t token_id) const {
  const auto found = markers_.find(token_id);
  return found == markers_.end() ? std::nullopt : std::optional(found->second);
}

std::optional<uint32_t> OutputMarkers::TokenOf(Marker marker) const {
  const auto found = std::find_if(markers_.begin(), markers_.end(),
                                  [marker](const auto& entry) { return entry.second == marker; });
  return found == markers_.end() ? std::nullopt : std::optional(found->first);
}

}  // namespace fathom
