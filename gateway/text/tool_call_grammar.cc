#include "gateway/text/tool_call_grammar.h"

#include <algorithm>
#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "base/status_macros.h"
#include "gateway/text/concat.h"
#include "gateway/text/python_json.h"

namespace fathom {
namespace {

namespace dom = simdjson::dom;

// White space between the parts of JSON: enough to indent by, too little to fill an answer with.
constexpr std::string_view kMaxWhitespace = "64";

std::string Quoted(std::string_view text) {
  std::string json = "\"";
  AppendJsonEscaped(text, json);
  return json += '"';
}

// Parts of a structural tag.
std::string Text(std::string_view text) {
  return Concat({R"({"type":"const_string","value":)", Quoted(text), "}"});
}
std::string Pattern(std::string_view pattern) {
  return Concat({R"({"type":"regex","pattern":)", Quoted(pattern), "}"});
}
std::string Json(std::string_view schema) {
  return Concat({R"({"type":"json_schema","max_whitespace_cnt":)", kMaxWhitespace,
                 R"(,"json_schema":)", schema, "}"});
}
std::string List(std::string_view type, absl::Span<const std::string> elements) {
  std::string json = Concat({R"({"type":")", type, R"(","elements":[)"});
  for (const std::string& element : elements) {
    Append(json, {&element == &elements.front() ? "" : ",", element});
  }
  return json += "]}";
}
std::string Sequence(absl::Span<const std::string> elements) { return List("sequence", elements); }
std::string AnyOf(absl::Span<const std::string> elements) {
  return elements.size() == 1 ? elements.front() : List("or", elements);
}
std::string Repeated(std::string_view type, std::string_view content) {
  return Concat({R"({"type":")", type, R"(","content":)", content, "}"});
}

// Whether it may stand in a call, and in quotes.
bool IsPlainName(std::string_view name) {
  constexpr size_t kMostBytes = 256;
  return !name.empty() && name.size() <= kMostBytes &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return static_cast<unsigned char>(c) > ' ' && c != '"' && c != '<' && c != '>' &&
                  c != 0x7f;
         });
}

// Arguments are an object, whatever it is that a tool says of them.
std::string_view SchemaOf(const ChatTool& tool) {
  return tool.parameters == "{}" ? R"({"type":"object"})" : std::string_view(tool.parameters);
}

// What stands between the tag of a DSML parameter and its end; `is_string`: not as JSON.
struct ParameterValue {
  bool is_string = false;
  std::string grammar;
};

ParameterValue ValueOf(dom::element schema) {
  dom::object object;
  if (schema.get(object)) return {.grammar = Json(simdjson::minify(schema))};
  bool is_string = false;
  std::vector<std::string> choices;
  for (const dom::key_value_pair field : object) {
    std::string_view type;
    dom::array values;
    if (field.key == "type") {
      is_string = !field.value.get(type) && type == "string";
    } else if (field.key == "enum" && !field.value.get(values)) {
      for (const dom::element value : values) {
        std::string_view choice;
        if (value.get(choice) || choice.empty()) return {.grammar = Json(simdjson::minify(schema))};
        choices.push_back(Text(choice));
      }
    } else if (field.key != "description" && field.key != "title" && field.key != "default" &&
               field.key != "examples") {
      return {.grammar = Json(simdjson::minify(schema))};
    }
  }
  if (!is_string) return {.grammar = Json(simdjson::minify(schema))};
  return {true, choices.empty() ? Pattern("[\\s\\S]*") : AnyOf(choices)};
}

class GrammarWriter {
 public:
  GrammarWriter(ToolSyntax syntax, const OutputMarkers& markers)
      : syntax_(syntax), markers_(markers) {}

  absl::StatusOr<std::string> Write(absl::Span<const ChatTool> tools, NumCalls num_calls) const {
    std::vector<std::string> calls;
    for (const ChatTool& tool : tools) {
      if (!IsPlainName(tool.name)) {
        return absl::InvalidArgumentError(
            Concat({"the tool '", tool.name,
                    "' cannot be called for certain: its name must have 1 to 256 bytes and no "
                    "white space, quotes, < or >"}));
      }
      ASSIGN_OR_RETURN(calls.emplace_back(), Call(tool));
    }
    const std::string call = AnyOf(calls);
    ASSIGN_OR_RETURN(std::vector<std::string> parts, Begin());
    parts.push_back(call);
    if (num_calls == NumCalls::kOneOrMore) {
      parts.push_back(
          Repeated("star", syntax_ == ToolSyntax::kV3 ? Sequence({{Text("\n"), call}}) : call));
    }
    ASSIGN_OR_RETURN(const std::vector<std::string> end, End());
    parts.insert(parts.end(), end.begin(), end.end());
    return Concat({R"({"type":"structural_tag","format":)", Sequence(parts), "}"});
  }

 private:
  using Parts = absl::StatusOr<std::vector<std::string>>;

  absl::StatusOr<std::string> Token(Marker marker) const {
    const std::optional<uint32_t> id = markers_.TokenOf(marker);
    if (!id.has_value()) {
      return absl::FailedPreconditionError(
          "the served model's tokenizer has no tokens for tool calls");
    }
    return Concat({R"({"type":"token","token":)", std::to_string(*id), "}"});
  }

  // "<｜DSML｜invoke name=…>" and the like.
  absl::StatusOr<std::vector<std::string>> Tag(std::string_view before,
                                               std::string_view after) const {
    ASSIGN_OR_RETURN(std::string dsml, Token(Marker::kDsml));
    return std::vector<std::string>{Text(before), std::move(dsml), Text(after)};
  }

  Parts Begin() const {
    if (syntax_ == ToolSyntax::kDsml) return Tag("\n\n<", "function_calls>\n");
    ASSIGN_OR_RETURN(std::string token, Token(Marker::kCallsBegin));
    return std::vector<std::string>{std::move(token)};
  }

  Parts End() const {
    if (syntax_ == ToolSyntax::kDsml) return Tag("</", "function_calls>");
    ASSIGN_OR_RETURN(std::string token, Token(Marker::kCallsEnd));
    return std::vector<std::string>{std::move(token)};
  }

  absl::StatusOr<std::string> Call(const ChatTool& tool) const {
    if (syntax_ == ToolSyntax::kDsml) return DsmlCall(tool);
    ASSIGN_OR_RETURN(const std::string begin, Token(Marker::kCallBegin));
    ASSIGN_OR_RETURN(const std::string separator, Token(Marker::kSeparator));
    ASSIGN_OR_RETURN(const std::string end, Token(Marker::kCallEnd));
    const std::string arguments = Json(SchemaOf(tool));
    switch (syntax_) {
      case ToolSyntax::kV3:
        return Sequence(
            {{begin, Text("function"), separator, Text(Concat({tool.name, "\n```json\n"})),
              arguments, Text("\n```"), end}});
      case ToolSyntax::kKimiK2:
        return Sequence({{begin, Text(Concat({"functions.", tool.name, ":"})),
                          Pattern("[0-9]{1,4}"), separator, arguments, end}});
      case ToolSyntax::kV31:
      case ToolSyntax::kDsml:
        break;
    }
    return Sequence({{begin, Text(tool.name), separator, arguments, end}});
  }

  absl::StatusOr<std::string> DsmlCall(const ChatTool& tool) const {
    ASSIGN_OR_RETURN(std::vector<std::string> parts,
                     Tag("<", Concat({"invoke name=\"", tool.name, "\">\n"})));
    ASSIGN_OR_RETURN(std::optional<std::vector<std::string>> parameters, Parameters(tool));
    if (parameters.has_value() && !parameters->empty()) {
      parts.insert(parts.end(), parameters->begin(), parameters->end());
    } else {
      if (!parameters.has_value()) parts.push_back(Json(SchemaOf(tool)));
      parts.push_back(Text("\n"));
    }
    ASSIGN_OR_RETURN(const std::vector<std::string> end, Tag("</", "invoke>\n"));
    parts.insert(parts.end(), end.begin(), end.end());
    return Sequence(parts);
  }

  // Nullopt when the schema is more than a list of properties.
  absl::StatusOr<std::optional<std::vector<std::string>>> Parameters(const ChatTool& tool) const {
    // What one property refers to may be elsewhere.
    if (tool.parameters.find("$ref") != std::string::npos) return std::nullopt;
    dom::parser parser;
    dom::object schema;
    if (parser.parse(SchemaOf(tool)).get(schema)) {
      return absl::InvalidArgumentError(
          Concat({"the parameters of the tool '", tool.name, "' are no JSON object"}));
    }
    dom::object properties;
    std::vector<std::string_view> required;
    bool is_object = false, has_properties = false;
    for (const dom::key_value_pair field : schema) {
      std::string_view type;
      bool allows_others = true;
      if (field.key == "type") {
        is_object = !field.value.get(type) && type == "object";
      } else if (field.key == "properties") {
        if (field.value.get(properties)) return std::nullopt;
        has_properties = true;
      } else if (field.key == "required") {
        dom::array names;
        if (field.value.get(names)) return std::nullopt;
        for (const dom::element name : names) {
          if (name.get(required.emplace_back())) return std::nullopt;
        }
      } else if (field.key == "additionalProperties") {
        if (field.value.get(allows_others) || allows_others) return std::nullopt;
      } else if (field.key != "description" && field.key != "title" && field.key != "$schema") {
        return std::nullopt;
      }
    }
    if (!is_object || !has_properties) return std::nullopt;
    std::vector<std::string> parameters;
    size_t num_required = 0;
    for (const dom::key_value_pair property : properties) {
      if (!IsPlainName(property.key)) return std::nullopt;
      ASSIGN_OR_RETURN(std::string parameter, Parameter(property.key, property.value));
      const bool is_required =
          std::find(required.begin(), required.end(), property.key) != required.end();
      if (is_required) ++num_required;
      parameters.push_back(is_required ? std::move(parameter) : Repeated("optional", parameter));
    }
    // A required one that is not there: the schema's own error, which JSON brings to light.
    if (num_required != required.size()) return std::nullopt;
    return parameters;
  }

  absl::StatusOr<std::string> Parameter(std::string_view name, dom::element schema) const {
    const ParameterValue value = ValueOf(schema);
    ASSIGN_OR_RETURN(std::vector<std::string> parts,
                     Tag("<", Concat({"parameter name=\"", name, "\" string=\"",
                                      value.is_string ? "true" : "false", "\">"})));
    parts.push_back(value.grammar);
    ASSIGN_OR_RETURN(const std::vector<std::string> end, Tag("</", "parameter>\n"));
    parts.insert(parts.end(), end.begin(), end.end());
    return Sequence(parts);
  }

  const ToolSyntax syntax_;
  const OutputMarkers& markers_;
};

}  // namespace

absl::StatusOr<std::string> ToolCallGrammar(absl::Span<const ChatTool> tools, NumCalls num_calls,
                                            ToolSyntax syntax, const OutputMarkers& markers) {
  return GrammarWriter(syntax, markers).Write(tools, num_calls);
}

}  // namespace fathom
