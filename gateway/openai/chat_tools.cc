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

constexpr char kNoParameters[] = R"({"type": "object", "properties": {}})";

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
  tool.parameters = parameters ? PythonJson(*parameters) : kNoParameters;
  tool.function = PythonJson(*function);
  tool.json = PythonJson(element);
  return tool;
}

bool HasTool(const std::vector<ChatTool>& tools, std::string_view name) {
  return std::any_of(tools.begin(), tools.end(),
                     [name](const ChatTool& tool) { return tool.name == name; });
}

// {"name": …, "description": …, SCHEMA_KEY: …}
absl::StatusOr<ChatTool> ReadBareTool(dom::element element, std::string name,
                                      std::string_view known_type, std::string_view schema_key) {
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(element, std::move(name)));
  std::optional<std::string> type, function_name, description;
  RETURN_IF_ERROR(fields.Read("type", type));
  if (type && *type != known_type) {
    return InvalidParameter(
        fields.NameOf("type"),
        absl::StrCat(fields.NameOf("type"), " is '", *type, "', only tools of type '",
                     std::string(known_type), "' are supported."));
  }
  RETURN_IF_ERROR(fields.Read("name", function_name));
  RETURN_IF_ERROR(fields.Read("description", description));
  if (!function_name || function_name->empty()) return fields.WrongType("name", "a string");
  const std::optional<dom::element> schema = fields.Find(schema_key);
  if (schema && !schema->is_object()) return fields.WrongType(schema_key, "an object");
  ChatTool tool;
  tool.name = *function_name;
  tool.description = description.value_or("");
  tool.parameters = schema ? PythonJson(*schema) : kNoParameters;
  tool.function = absl::StrCat("{\"name\": ", PythonJson(*fields.Find("name")));
  if (description) {
    absl::StrAppend(&tool.function, ", \"description\": ", PythonJson(*fields.Find("description")));
  }
  absl::StrAppend(&tool.function, ", \"parameters\": ", tool.parameters, "}");
  tool.json = absl::StrCat("{\"type\": \"function\", \"function\": ", tool.function, "}");
  return tool;
}

// Calls `read` for every element of `tools`, with its name.
template <typename Read>
absl::StatusOr<std::vector<ChatTool>> ReadList(const JsonFields& fields, const Read& read) {
  std::vector<ChatTool> tools;
  const std::optional<dom::element> value = fields.Find("tools");
  if (!value) return tools;
  dom::array array;
  if (value->get(array)) return fields.WrongType("tools", "a list of tools");
  for (const dom::element element : array) {
    ASSIGN_OR_RETURN(ChatTool tool, read(element, absl::StrCat("tools[", tools.size(), "]")));
    tools.push_back(std::move(tool));
  }
  return tools;
}

}  // namespace

absl::StatusOr<std::vector<ChatTool>> ReadTools(const JsonFields& fields) {
  return ReadList(fields, ReadTool);
}

absl::StatusOr<std::vector<ChatTool>> ReadBareTools(const JsonFields& fields,
                                                    std::string_view known_type,
                                                    std::string_view schema_key) {
  return ReadList(fields, [&](dom::element element, std::string name) {
    return ReadBareTool(element, std::move(name), known_type, schema_key);
  });
}

absl::StatusOr<ToolCalls> ToolCallsOf(const ToolChoice& choice,
                                      const std::vector<ChatTool>& tools) {
  const ToolCalls if_allowed = choice.parallel ? ToolCalls::kAny : ToolCalls::kOne;
  switch (choice.kind) {
    case ToolChoice::Kind::kNone:
      return ToolCalls::kNone;
    case ToolChoice::Kind::kUnsaid:
      return tools.empty() ? ToolCalls::kNone : if_allowed;
    default:
      break;
  }
  if (tools.empty()) {
    return InvalidParameter("tool_choice", "When using `tool_choice`, `tools` must be set.");
  }
  if (choice.kind != ToolChoice::Kind::kNamed) return if_allowed;
  if (HasTool(tools, choice.name)) return ToolCalls::kOne;
  return InvalidParameter(
      "tool_choice",
      "The tool specified in `tool_choice` does not match any of the specified `tools`");
}

absl::StatusOr<ToolChoice> ReadToolChoice(const JsonFields& fields, FunctionName where) {
  ToolChoice choice;
  RETURN_IF_ERROR(fields.Read("parallel_tool_calls", choice.parallel));
  const std::optional<dom::element> value = fields.Find("tool_choice");
  if (!value) return choice;
  std::string_view word;
  if (value->is_object()) {
    ASSIGN_OR_RETURN(JsonFields named, JsonFields::Of(*value, "tool_choice"));
    if (where == FunctionName::kWrapped) {
      const std::optional<dom::element> function = named.Find("function");
      if (!function) return named.WrongType("function", "an object");
      ASSIGN_OR_RETURN(named, JsonFields::Of(*function, "tool_choice.function"));
    }
    std::optional<std::string> name;
    RETURN_IF_ERROR(named.Read("name", name));
    if (!name) return named.WrongType("name", "a string");
    choice.kind = ToolChoice::Kind::kNamed;
    choice.name = *std::move(name);
  } else if (value->get(word)) {
    return fields.WrongType("tool_choice", "a string or an object");
  } else if (word == "none") {
    choice.kind = ToolChoice::Kind::kNone;
  } else if (word == "auto") {
    choice.kind = ToolChoice::Kind::kAuto;
  } else if (word == "required") {
    // As in vLLM, `required` with an empty list of tools is none.
    const std::optional<dom::element> tools = fields.Find("tools");
    dom::array list;
    const bool is_empty = tools && !tools->get(list) && list.size() == 0;
    choice.kind = is_empty ? ToolChoice::Kind::kNone : ToolChoice::Kind::kRequired;
  } else {
    return InvalidParameter("tool_choice",
                            absl::StrCat("tool_choice must be 'none', 'auto', 'required' or a tool "
                                         "by name, got '",
                                         std::string(word), "'."));
  }
  return choice;
}

}  // namespace fathom
