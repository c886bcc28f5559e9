#include "gateway/openai/structured_output.h"

#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "gateway/openai/errors.h"
#include "gateway/text/python_json.h"

namespace fathom {
namespace {

namespace dom = simdjson::dom;

// As in grammar/compiler/schema_check.h.
constexpr size_t kMaxChoices = 2048;
constexpr char kAnyObject[] = R"({"type":"object"})";

// Collects the wish of a request, of which there is at most one.
class Wish {
 public:
  explicit Wish(std::optional<StructuredOutput> made = std::nullopt) : output_(std::move(made)) {}

  absl::Status Add(const std::string& param, v1::Grammar::Kind kind, std::string text) {
    if (output_) {
      return InvalidParameter(param, absl::StrCat("You can only use one kind of constraints for "
                                                  "structured outputs, got ",
                                                  output_->param, " and ", param, "."));
    }
    if (text.empty()) return InvalidParameter(param, absl::StrCat(param, " must not be empty."));
    if (text.size() > kMaxGrammarBytes) {
      return InvalidParameter(param, absl::StrCat(param, " has ", text.size(), " bytes, limit ",
                                                  kMaxGrammarBytes, "."));
    }
    output_.emplace().param = param;
    output_->grammar.set_kind(kind);
    output_->grammar.set_text(std::move(text));
    return absl::OkStatus();
  }

  // Does nothing where there is none.
  void Rename(std::string param) {
    if (output_) output_->param = std::move(param);
  }

  bool IsMade() const { return output_.has_value(); }
  std::optional<StructuredOutput> Take() { return std::move(output_); }

 private:
  std::optional<StructuredOutput> output_;
};

absl::Status AddSchema(const JsonFields& fields, std::string_view key, Wish& wish) {
  const std::optional<dom::element> value = fields.Find(key);
  if (!value) return absl::OkStatus();
  std::string_view text;
  if (!value->get(text)) {
    return wish.Add(fields.NameOf(key), v1::Grammar::KIND_JSON_SCHEMA, std::string(text));
  }
  if (!value->is_object() && !value->is_bool()) {
    return fields.WrongType(key, "a JSON schema or its text");
  }
  return wish.Add(fields.NameOf(key), v1::Grammar::KIND_JSON_SCHEMA, simdjson::minify(*value));
}

absl::Status AddText(const JsonFields& fields, std::string_view key, v1::Grammar::Kind kind,
                     Wish& wish) {
  std::optional<std::string> text;
  RETURN_IF_ERROR(fields.Read(key, text));
  return text ? wish.Add(fields.NameOf(key), kind, *std::move(text)) : absl::OkStatus();
}

// Two hex digits after \x, as in every dialect: xgrammar reads whatever hex digits follow, but four
// after \u.
std::string WithTwoHexDigits(std::string_view regex) {
  std::string result;
  for (size_t i = 0; i < regex.size(); ++i) {
    const std::string_view escape = regex.substr(i, 4);
    const bool is_hex = escape.size() == 4 && escape.starts_with("\\x") &&
                        absl::ascii_isxdigit(escape[2]) && absl::ascii_isxdigit(escape[3]);
    if (is_hex) {
      result += "\\u00";
      result += escape.substr(2);
      i += 3;
    } else {
      result += regex[i];
      if (regex[i] == '\\' && i + 1 < regex.size()) result += regex[++i];
    }
  }
  return result;
}

absl::Status AddRegex(const JsonFields& fields, std::string_view key, Wish& wish) {
  std::optional<std::string> regex;
  RETURN_IF_ERROR(fields.Read(key, regex));
  if (!regex) return absl::OkStatus();
  return wish.Add(fields.NameOf(key), v1::Grammar::KIND_REGEX, WithTwoHexDigits(*regex));
}

absl::Status AddChoices(const JsonFields& fields, std::string_view key, Wish& wish) {
  if (!fields.Find(key)) return absl::OkStatus();
  std::vector<std::string> choices;
  RETURN_IF_ERROR(fields.ReadStrings(key, choices));
  const std::string name = fields.NameOf(key);
  if (choices.empty() || choices.size() > kMaxChoices) {
    return InvalidParameter(name, absl::StrCat(name, " has ", choices.size(),
                                               " strings, expected 1 to ", kMaxChoices, "."));
  }
  return wish.Add(name, v1::Grammar::KIND_EBNF, GrammarOfChoices(choices));
}

// What `type` says, of a response_format or text.format; json_schema: what `schema_of` gives.
template <typename SchemaOf>
absl::Status AddFormat(const JsonFields& format, const std::string& name, const SchemaOf& schema_of,
                       Wish& wish) {
  std::optional<std::string> type;
  RETURN_IF_ERROR(format.Read("type", type));
  if (!type) return format.WrongType("type", "a string");
  if (*type == "text") return absl::OkStatus();
  if (*type == "json_object") {
    return wish.Add(name, v1::Grammar::KIND_JSON_SCHEMA, kAnyObject);
  }
  if (*type != "json_schema") return NotSupportedYet(name, absl::StrCat(name, " ", *type));
  ASSIGN_OR_RETURN(const JsonFields named, schema_of());
  bool strict = false;
  RETURN_IF_ERROR(named.Read("strict", strict));
  std::optional<std::string> ignored;
  RETURN_IF_ERROR(named.Read("name", ignored));
  RETURN_IF_ERROR(named.Read("description", ignored));
  if (!named.Find("schema")) return named.WrongType("schema", "a JSON schema");
  return AddSchema(named, "schema", wish);
}

absl::Status AddResponseFormat(const JsonFields& fields, Wish& wish) {
  const std::optional<dom::element> value = fields.Find("response_format");
  if (!value) return absl::OkStatus();
  ASSIGN_OR_RETURN(const JsonFields format, JsonFields::Of(*value, "response_format"));
  const auto schema_of = [&]() -> absl::StatusOr<JsonFields> {
    const std::optional<dom::element> json_schema = format.Find("json_schema");
    if (!json_schema) return format.WrongType("json_schema", "an object");
    return JsonFields::Of(*json_schema, "response_format.json_schema");
  };
  RETURN_IF_ERROR(AddFormat(format, "response_format", schema_of, wish));
  wish.Rename("response_format");
  return absl::OkStatus();
}

absl::Status AddJsonObject(const JsonFields& fields, std::string_view key, Wish& wish) {
  bool json_object = false;
  RETURN_IF_ERROR(fields.Read(key, json_object));
  if (!json_object) return absl::OkStatus();
  return wish.Add(fields.NameOf(key), v1::Grammar::KIND_JSON_SCHEMA, kAnyObject);
}

// `prefix` stands before each key.
absl::Status AddKinds(const JsonFields& fields, const std::string& prefix, Wish& wish) {
  RETURN_IF_ERROR(AddSchema(fields, prefix + "json", wish));
  RETURN_IF_ERROR(AddRegex(fields, prefix + "regex", wish));
  RETURN_IF_ERROR(AddChoices(fields, prefix + "choice", wish));
  RETURN_IF_ERROR(AddText(fields, prefix + "grammar", v1::Grammar::KIND_EBNF, wish));
  RETURN_IF_ERROR(AddJsonObject(fields, prefix + "json_object", wish));
  for (const char* const name : {"whitespace_pattern", "structural_tag"}) {
    const std::string key = prefix + name;
    if (fields.Find(key)) return NotSupportedYet(fields.NameOf(key), fields.NameOf(key));
  }
  for (const char* const name : {"disable_any_whitespace", "disable_additional_properties"}) {
    bool is_wanted = false;
    RETURN_IF_ERROR(fields.Read(prefix + name, is_wanted));
    const std::string full_name = fields.NameOf(prefix + name);
    if (is_wanted) return NotSupportedYet(full_name, full_name);
  }
  return absl::OkStatus();
}

// As a part of a structural tag. Nullopt: it is no JSON.
std::optional<std::string> FormatOf(const v1::Grammar& grammar) {
  std::string quoted = "\"";
  AppendJsonEscaped(grammar.text(), quoted);
  quoted += '"';
  dom::parser parser;
  dom::element json;
  switch (grammar.kind()) {
    case v1::Grammar::KIND_REGEX:
      return absl::StrCat(R"({"type":"regex","pattern":)", quoted, "}");
    case v1::Grammar::KIND_EBNF:
      return absl::StrCat(R"({"type":"grammar","grammar":)", quoted, "}");
    case v1::Grammar::KIND_STRUCTURAL_TAG:
      if (parser.parse(grammar.text()).at_key("format").get(json)) return std::nullopt;
      return std::string(simdjson::minify(json));
    default:
      if (parser.parse(grammar.text()).get(json)) return std::nullopt;
      return absl::StrCat(R"({"type":"json_schema","max_whitespace_cnt":64,"json_schema":)",
                          std::string(simdjson::minify(json)), "}");
  }
}

}  // namespace

v1::Grammar MayThinkFirst(const v1::Grammar& grammar, uint32_t think, uint32_t think_end,
                          absl::Span<const uint32_t> no_thoughts) {
  const std::optional<std::string> format = FormatOf(grammar);
  if (!format.has_value()) return grammar;
  std::string excluded = absl::StrCat(think_end);
  for (const uint32_t token_id : no_thoughts) absl::StrAppend(&excluded, ",", token_id);
  v1::Grammar result;
  result.set_kind(v1::Grammar::KIND_STRUCTURAL_TAG);
  result.set_text(absl::StrCat(
      R"({"type":"structural_tag","format":{"type":"sequence","elements":[)",
      R"({"type":"optional","content":{"type":"sequence","elements":[{"type":"token","token":)",
      think, R"(},{"type":"any_tokens","exclude_tokens":[)", excluded,
      R"(]},{"type":"token","token":)", think_end, R"(}]}},)", *format, "]}}"));
  return result;
}

absl::StatusOr<std::optional<StructuredOutput>> ReadStructuredOutput(const JsonFields& fields) {
  Wish wish;
  RETURN_IF_ERROR(AddResponseFormat(fields, wish));
  RETURN_IF_ERROR(AddKinds(fields, "guided_", wish));
  if (const std::optional<dom::element> value = fields.Find("structured_outputs")) {
    ASSIGN_OR_RETURN(const JsonFields outputs, JsonFields::Of(*value, "structured_outputs"));
    RETURN_IF_ERROR(AddKinds(outputs, "", wish));
    const bool says_nothing = value->get_object().value_unsafe().size() == 0;
    if (!wish.IsMade() && !says_nothing && !outputs.Find("json_object")) {
      return InvalidParameter("structured_outputs",
                              "structured_outputs has none of json, regex, choice, grammar and "
                              "json_object.");
    }
  }
  return wish.Take();
}

absl::Status AddTextFormat(const JsonFields& text_format, std::optional<StructuredOutput>& output) {
  Wish wish(std::move(output));
  const auto itself = [&]() -> absl::StatusOr<JsonFields> { return text_format; };
  RETURN_IF_ERROR(AddFormat(text_format, "text.format", itself, wish));
  output = wish.Take();
  return absl::OkStatus();
}

std::string GrammarOfChoices(absl::Span<const std::string> choices) {
  std::string rules = "root ::= ";
  const char* separator = "";
  for (const std::string& choice : choices) {
    absl::StrAppend(&rules, separator, "\"");
    separator = " | ";
    for (const char c : choice) {
      if (c == '"' || c == '\\') {
        rules += '\\';
        rules += c;
      } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
        // Not \x: that reads whatever hex digits follow, the text's own too.
        absl::StrAppendFormat(&rules, "\\u%04x", static_cast<unsigned char>(c));
      } else {
        rules += c;
      }
    }
    rules += '"';
  }
  return rules;
}

}  // namespace fathom
