#include "gateway/openai/chat_tools.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "gateway/openai/errors.h"
#include "gateway/text/python_json.h"

namespace fathom {
namespace {

namespace dom = simdjson::dom;

constexpr char kNoParameters[] = R"({"type": "object", "properties": {}})";

// As in text/tool_call_grammar.cc.
constexpr size_t kMaxNameBytes = 256;

absl::Status CheckType(const JsonFields& fields, std::string_view known_type) {
  std::optional<std::string> type;
  RETURN_IF_ERROR(fields.Read("type", type));
  if (!type || *type == known_type) return absl::OkStatus();
  return InvalidParameter(
      fields.NameOf("type"),
      absl::StrCat(fields.NameOf("type"), " is '", *type, "', only tools of type '",
                   std::string(known_type), "' are supported."));
}

// The arguments of a call are an object, so this is what their schema must be about.
absl::Status CheckIsOfObjects(dom::element schema, std::string name) {
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(schema, std::move(name)));
  const auto is_object = [](dom::element word) {
    std::string_view text;
    return !word.get(text) && text == "object";
  };
  if (const std::optional<dom::element> type = fields.Find("type")) {
    dom::array types;
    const bool fits =
        type->get(types) ? is_object(*type) : std::any_of(types.begin(), types.end(), is_object);
    if (!fits) {
      const std::string field = fields.NameOf("type");
      return InvalidParameter(field, absl::StrCat(field,
                                                  " must be 'object': the arguments of a "
                                                  "call are an object."));
    }
  }
  const std::optional<dom::element> properties = fields.Find("properties");
  if (properties && !properties->is_object()) return fields.WrongType("properties", "an object");
  std::vector<std::string> required;
  return fields.ReadStrings("required", required);
}

// Name, description and, at `schema_key`, the schema of a function; the JSON is not written yet.
absl::StatusOr<ChatTool> ReadFunction(const JsonFields& fields, std::string_view schema_key) {
  std::optional<std::string> name, description;
  RETURN_IF_ERROR(fields.Read("name", name));
  RETURN_IF_ERROR(fields.Read("description", description));
  bool ignored = false;
  RETURN_IF_ERROR(fields.Read("strict", ignored));
  if (!name) return fields.WrongType("name", "a string");
  if (name->empty() || name->size() > kMaxNameBytes) {
    const std::string field = fields.NameOf("name");
    return InvalidParameter(field, absl::StrCat(field, " has ", name->size(),
                                                " bytes, expected 1 to ", kMaxNameBytes, "."));
  }
  ChatTool tool;
  tool.name = *std::move(name);
  tool.description = description.value_or("");
  tool.parameters = kNoParameters;
  const std::optional<dom::element> schema = fields.Find(schema_key);
  if (!schema) return tool;
  if (!schema->is_object()) return fields.WrongType(schema_key, "an object");
  RETURN_IF_ERROR(CheckIsOfObjects(*schema, fields.NameOf(schema_key)));
  tool.parameters = PythonJson(*schema);
  return tool;
}

absl::StatusOr<ChatTool> ReadTool(dom::element element, std::string name) {
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(element, std::move(name)));
  RETURN_IF_ERROR(CheckType(fields, "function"));
  const std::optional<dom::element> function = fields.Find("function");
  if (!function) return fields.WrongType("function", "an object");
  ASSIGN_OR_RETURN(const JsonFields named, JsonFields::Of(*function, fields.NameOf("function")));
  ASSIGN_OR_RETURN(ChatTool tool, ReadFunction(named, "parameters"));
  tool.function = PythonJson(*function);
  tool.json = PythonJson(element);
  return tool;
}

// {"name": …, "description": …, SCHEMA_KEY: …}
absl::StatusOr<ChatTool> ReadBareTool(dom::element element, std::string name,
                                      std::string_view known_type, std::string_view schema_key) {
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(element, std::move(name)));
  RETURN_IF_ERROR(CheckType(fields, known_type));
  ASSIGN_OR_RETURN(ChatTool tool, ReadFunction(fields, schema_key));
  tool.function = absl::StrCat("{\"name\": ", PythonJson(*fields.Find("name")));
  if (const std::optional<dom::element> description = fields.Find("description")) {
    absl::StrAppend(&tool.function, ", \"description\": ", PythonJson(*description));
  }
  absl::StrAppend(&tool.function, ", \"parameters\": ", tool.parameters, "}");
  tool.json = absl::StrCat("{\"type\": \"function\", \"function\": ", tool.function, "}");
  return tool;
}

// Calls `read` for every element of `tools`, with its name. `name_key`: below an element, its
// function's name.
template <typename Read>
absl::StatusOr<std::vector<ChatTool>> ReadList(const JsonFields& fields, std::string_view name_key,
                                               const Read& read) {
  std::vector<ChatTool> tools;
  const std::optional<dom::element> value = fields.Find("tools");
  if (!value) return tools;
  dom::array array;
  if (value->get(array)) return fields.WrongType("tools", "a list of tools");
  absl::flat_hash_set<std::string> names;
  for (const dom::element element : array) {
    const std::string place = absl::StrCat("tools[", tools.size(), "]");
    ASSIGN_OR_RETURN(ChatTool tool, read(element, place));
    if (!names.insert(tool.name).second) {
      const std::string field = absl::StrCat(place, ".", std::string(name_key));
      return InvalidParameter(field, absl::StrCat(field, " is '", tool.name,
                                                  "', which an earlier tool is called too."));
    }
    tools.push_back(std::move(tool));
  }
  return tools;
}

bool HasTool(const std::vector<ChatTool>& tools, std::string_view name) {
  return std::any_of(tools.begin(), tools.end(),
                     [name](const ChatTool& tool) { return tool.name == name; });
}

// Of an element that chooses a tool: its name, and where that stands.
absl::StatusOr<ToolChoice::Chosen> ReadChosen(const JsonFields& fields, FunctionName where) {
  std::optional<std::string> name;
  if (where == FunctionName::kWrapped) {
    const std::optional<dom::element> function = fields.Find("function");
    if (!function) return fields.WrongType("function", "an object");
    ASSIGN_OR_RETURN(const JsonFields named, JsonFields::Of(*function, fields.NameOf("function")));
    return ReadChosen(named, FunctionName::kBare);
  }
  RETURN_IF_ERROR(fields.Read("name", name));
  if (!name) return fields.WrongType("name", "a string");
  return ToolChoice::Chosen{*std::move(name), fields.NameOf("name")};
}

// {"mode": "auto" or "required", "tools": […]}
absl::Status ReadAllowedTools(const JsonFields& fields, FunctionName where, ToolChoice& choice) {
  std::optional<std::string> mode;
  RETURN_IF_ERROR(fields.Read("mode", mode));
  if (mode != "auto" && mode != "required") {
    const std::string field = fields.NameOf("mode");
    return InvalidParameter(field, absl::StrCat(field, " must be 'auto' or 'required', got '",
                                                mode.value_or(""), "'."));
  }
  choice.kind = mode == "auto" ? ToolChoice::Kind::kAuto : ToolChoice::Kind::kRequired;
  const std::optional<dom::element> value = fields.Find("tools");
  dom::array tools;
  if (!value || value->get(tools)) return fields.WrongType("tools", "a list of tools");
  if (tools.size() == 0) {
    const std::string field = fields.NameOf("tools");
    return InvalidParameter(field, absl::StrCat(field, " must name a tool."));
  }
  for (const dom::element element : tools) {
    const std::string place = absl::StrCat(fields.NameOf("tools"), "[", choice.chosen.size(), "]");
    ASSIGN_OR_RETURN(const JsonFields tool, JsonFields::Of(element, place));
    RETURN_IF_ERROR(CheckType(tool, "function"));
    ASSIGN_OR_RETURN(ToolChoice::Chosen chosen, ReadChosen(tool, where));
    choice.chosen.push_back(std::move(chosen));
  }
  return absl::OkStatus();
}

absl::Status ReadObjectChoice(const JsonFields& fields, FunctionName where, ToolChoice& choice) {
  std::optional<std::string> type;
  RETURN_IF_ERROR(fields.Read("type", type));
  if (type == "allowed_tools") {
    if (where == FunctionName::kBare) return ReadAllowedTools(fields, where, choice);
    const std::optional<dom::element> allowed = fields.Find("allowed_tools");
    if (!allowed) return fields.WrongType("allowed_tools", "an object");
    ASSIGN_OR_RETURN(const JsonFields named,
                     JsonFields::Of(*allowed, fields.NameOf("allowed_tools")));
    return ReadAllowedTools(named, where, choice);
  }
  if (type && *type != "function") {
    const std::string field = fields.NameOf("type");
    return InvalidParameter(
        field, absl::StrCat(field, " must be 'function' or 'allowed_tools', got '", *type, "'."));
  }
  choice.kind = ToolChoice::Kind::kNamed;
  ASSIGN_OR_RETURN(ToolChoice::Chosen chosen, ReadChosen(fields, where));
  choice.chosen.push_back(std::move(chosen));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<ChatTool>> ReadTools(const JsonFields& fields) {
  return ReadList(fields, "function.name", ReadTool);
}

absl::StatusOr<std::vector<ChatTool>> ReadBareTools(const JsonFields& fields,
                                                    std::string_view known_type,
                                                    std::string_view schema_key) {
  return ReadList(fields, "name", [&](dom::element element, std::string name) {
    return ReadBareTool(element, std::move(name), known_type, schema_key);
  });
}

absl::StatusOr<ToolCalls> ApplyToolChoice(const ToolChoice& choice, std::vector<ChatTool>& tools) {
  const bool is_unsaid = choice.kind == ToolChoice::Kind::kUnsaid;
  if (choice.kind == ToolChoice::Kind::kNone || (is_unsaid && tools.empty())) {
    tools.clear();
    return ToolCalls::kNone;
  }
  if (tools.empty()) {
    return InvalidParameter("tool_choice", "When using `tool_choice`, `tools` must be set.");
  }
  absl::flat_hash_set<std::string> chosen;
  for (const ToolChoice::Chosen& tool : choice.chosen) {
    if (!HasTool(tools, tool.name)) {
      return InvalidParameter(
          tool.field,
          "The tool specified in `tool_choice` does not match any of the specified `tools`");
    }
    chosen.insert(tool.name);
  }
  const bool is_named = choice.kind == ToolChoice::Kind::kNamed;
  if (!is_named && !chosen.empty()) {
    std::erase_if(tools, [&](const ChatTool& tool) { return !chosen.contains(tool.name); });
  }
  return is_named || !choice.parallel ? ToolCalls::kOne : ToolCalls::kAny;
}

absl::StatusOr<ToolChoice> ReadToolChoice(const JsonFields& fields, FunctionName where) {
  ToolChoice choice;
  RETURN_IF_ERROR(fields.Read("parallel_tool_calls", choice.parallel));
  const std::optional<dom::element> value = fields.Find("tool_choice");
  if (!value) return choice;
  std::string_view word;
  if (value->is_object()) {
    ASSIGN_OR_RETURN(const JsonFields named, JsonFields::Of(*value, "tool_choice"));
    RETURN_IF_ERROR(ReadObjectChoice(named, where, choice));
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
