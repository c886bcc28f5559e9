#include "gateway/openai/chat_tools.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "gateway/openai/errors.h"
#include "gateway/text/python_json.h"

namespace fathom {
namespace {

namespace dom = simdjson::dom;

absl::StatusOr<ChatTool> ReadTool(dom::element element, std::string name) {
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(element, std::move(name)));
  std::optional<std::string> type;
  RETURN_IF_ERROR(fields.Read("type", type));
  if (type && *type != "function") {
    return InvalidParameter(fields.NameOf("type"),
                            absl::StrCat(fields.NameOf("type"), " is '", *type,
                                         "', only tools of type 'function' are supported."));
  }
  const std::optional<dom::element> function = fields.Find("function");
  if (!function) return fields.WrongType("function", "an object");
  ASSIGN_OR_RETURN(const JsonFields named, JsonFields::Of(*function, fields.NameOf("function")));
  std::optional<std::string> function_name, description;
  RETURN_IF_ERROR(named.Read("name", function_name));
  RETURN_IF_ERROR(named.Read("description", description));
  if (!function_name || function_name->empty()) return named.WrongType("name", "a string");
  ChatTool tool;
  tool.name = *std::move(function_name);
  tool.description = description.value_or("");
  const std::optional<dom::element> parameters = named.Find("parameters");
  if (parameters && !parameters->is_object()) return named.WrongType("parameters", "an object");
  tool.parameters =
      parameters ? PythonJson(*parameters) : R"({"type": "object", "properties": {}})";
  tool.function = PythonJson(*function);
  tool.json = PythonJson(element);
  return tool;
}

bool HasTool(const std::vector<ChatTool>& tools, std::string_view name) {
  return std::any_of(tools.begin(), tools.end(),
                     [name](const ChatTool& tool) { return tool.name == name; });
}

absl::Status NeedsConstraint(std::string_view choice) {
  return InvalidParameter(
      "tool_choice",
      absl::StrCat("tool_choice ", std::string(choice),
                   " is not supported yet: it needs structured output. Use 'auto' or 'none'."));
}

// {"type": "function", "function": {"name": …}}
absl::Status CheckNamedChoice(dom::element choice, const std::vector<ChatTool>& tools) {
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(choice, "tool_choice"));
  const std::optional<dom::element> function = fields.Find("function");
  if (!function) return fields.WrongType("function", "an object");
  ASSIGN_OR_RETURN(const JsonFields named, JsonFields::Of(*function, "tool_choice.function"));
  std::optional<std::string> name;
  RETURN_IF_ERROR(named.Read("name", name));
  if (!name) return named.WrongType("name", "a string");
  if (!HasTool(tools, *name)) {
    return InvalidParameter(
        "tool_choice",
        "The tool specified in `tool_choice` does not match any of the specified `tools`");
  }
  return NeedsConstraint("of one tool by name");
}

}  // namespace

absl::StatusOr<std::vector<ChatTool>> ReadTools(const JsonFields& fields) {
  std::vector<ChatTool> tools;
  const std::optional<dom::element> value = fields.Find("tools");
  if (!value) return tools;
  dom::array array;
  if (value->get(array)) return fields.WrongType("tools", "a list of tools");
  for (const dom::element element : array) {
    ASSIGN_OR_RETURN(ChatTool tool, ReadTool(element, absl::StrCat("tools[", tools.size(), "]")));
    tools.push_back(std::move(tool));
  }
  return tools;
}

absl::StatusOr<ToolCalls> ReadToolChoice(const JsonFields& fields,
                                         const std::vector<ChatTool>& tools) {
  bool parallel = true;
  RETURN_IF_ERROR(fields.Read("parallel_tool_calls", parallel));
  const ToolCalls if_allowed = parallel ? ToolCalls::kAny : ToolCalls::kOne;
  const std::optional<dom::element> choice = fields.Find("tool_choice");
  if (!choice) return tools.empty() ? ToolCalls::kNone : if_allowed;
  std::string_view name;
  const bool is_object = choice->is_object();
  if (!is_object && choice->get(name)) {
    return fields.WrongType("tool_choice", "a string or an object");
  }
  if (name == "none" && !is_object) return ToolCalls::kNone;
  if (tools.empty()) {
    // As in vLLM, `required` with an empty list of tools is none.
    if (name == "required" && fields.Find("tools")) return ToolCalls::kNone;
    return InvalidParameter("tool_choice", "When using `tool_choice`, `tools` must be set.");
  }
  if (is_object) return CheckNamedChoice(*choice, tools);
  if (name == "auto") return if_allowed;
  if (name == "required") return NeedsConstraint("'required'");
  return InvalidParameter("tool_choice",
                          absl::StrCat("tool_choice must be 'none', 'auto', 'required' or a tool "
                                       "by name, got '",
                                       std::string(name), "'."));
}

}  // namespace fathom
