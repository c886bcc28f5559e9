#include "gateway/text/tool_call_parser.h"

#include <algorithm>

#include "gateway/text/dsml_call_parser.h"
#include "gateway/text/marked_call_parser.h"

namespace fathom {

std::unique_ptr<ToolCallParser> MakeToolCallParser(ToolSyntax syntax) {
  if (syntax == ToolSyntax::kDsml) return std::make_unique<DsmlCallParser>();
  return std::make_unique<MarkedCallParser>(syntax);
}

size_t HeldBytes(std::string_view text, std::string_view word) {
  for (size_t held = std::min(text.size(), word.size() - 1); held > 0; --held) {
    if (word.starts_with(text.substr(text.size() - held))) return held;
  }
  return 0;
}

std::string_view StrippedFront(std::string_view text) {
  return text.substr(std::min(text.find_first_not_of(" \t\r\n"), text.size()));
}

std::string_view Stripped(std::string_view text) {
  const size_t last = text.find_last_not_of(" \t\r\n");
  return StrippedFront(text.substr(0, last == std::string_view::npos ? 0 : last + 1));
}

}  // namespace fathom
