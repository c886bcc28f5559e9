#include "grammar/compiler/schema_check.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "simdjson.h"

namespace fathom {
namespace {

namespace dom = simdjson::dom;

// Of these xgrammar looks at the first that is there, and at nothing else.
constexpr std::array<std::string_view, 6> kAlone = {"$ref",  "const", "enum",
                                                    "anyOf", "oneOf", "allOf"};

struct TypeKeyword {
  std::string_view keyword;
  std::string_view type;  // the only one that it is about
};
constexpr TypeKeyword kTypeKeywords[] = {
    {"minimum", "number"},
    {"maximum", "number"},
    {"exclusiveMinimum", "number"},
    {"exclusiveMaximum", "number"},
    {"multipleOf", "number"},
    {"minLength", "string"},
    {"maxLength", "string"},
    {"pattern", "string"},
    {"prefixItems", "array"},
    {"items", "array"},
    {"minItems", "array"},
    {"maxItems", "array"},
    {"unevaluatedItems", "array"},
    {"properties", "object"},
    {"required", "object"},
    {"patternProperties", "object"},
    {"propertyNames", "object"},
    {"additionalProperties", "object"},
    {"minProperties", "object"},
    {"maxProperties", "object"},
    {"unevaluatedProperties", "object"},
};

// Without a type, these alone make xgrammar think of an object or an array.
constexpr std::array<std::string_view, 6> kImplyType = {
    "properties", "additionalProperties", "unevaluatedProperties",
    "items",      "prefixItems",          "unevaluatedItems"};

constexpr std::array<std::string_view, 9> kUnsupported = {
    "not",      "if",          "dependentRequired", "dependentSchemas", "dependencies",
    "contains", "$dynamicRef", "$recursiveRef",     "additionalItems"};

constexpr std::array<std::string_view, 7> kTypes = {"string", "number", "integer", "boolean",
                                                    "null",   "object", "array"};

constexpr std::array<std::string_view, 5> kNumbers = {"minimum", "maximum", "exclusiveMinimum",
                                                      "exclusiveMaximum", "multipleOf"};

struct Counts {
  std::string_view least;
  std::string_view most;
};
constexpr Counts kCounts[] = {
    {"minLength", "maxLength"}, {"minItems", "maxItems"}, {"minProperties", "maxProperties"}};
constexpr double kTooLarge = 9223372036854775808.0;  // 2^63
constexpr int64_t kMostCounted = std::numeric_limits<int32_t>::max();

using Fields = std::vector<std::pair<std::string_view, dom::element>>;

const dom::element* Find(const Fields& fields, std::string_view key) {
  const auto found = std::find_if(fields.begin(), fields.end(),
                                  [key](const auto& field) { return field.first == key; });
  return found == fields.end() ? nullptr : &found->second;
}

std::string EscapeToken(std::string_view token) {
  std::string escaped;
  for (const char c : token) {
    if (c == '~') {
      escaped += "~0";
    } else if (c == '/') {
      escaped += "~1";
    } else {
      escaped += c;
    }
  }
  return escaped;
}

bool IsOfType(dom::element value, std::string_view type) {
  if (type == "integer") {
    double number = 0;
    return value.is<int64_t>() || value.is<uint64_t>() ||
           (!value.get(number) && number == static_cast<double>(static_cast<int64_t>(number)));
  }
  return (type == "string" && value.is_string()) || (type == "number" && value.is_number()) ||
         (type == "boolean" && value.is_bool()) || (type == "null" && value.is_null()) ||
         (type == "object" && value.is_object()) || (type == "array" && value.is_array());
}

// Whether xgrammar could let it match what stands in no JSON string as it is: control characters,
// quotes and backslashes. It leaves them out itself, but not from patterns beyond ASCII
// (cmake/xgrammar.cmake mends the others): of those only the plainest are safe.
bool MayLeaveJson(std::string_view pattern) {
  const auto is_ascii = [](unsigned char c) { return c >= 0x20 && c <= 0x7e; };
  if (std::all_of(pattern.begin(), pattern.end(), is_ascii)) return false;
  constexpr std::string_view kPlainEscapes = "dw.-/+*?()[]{}^$|";
  for (size_t i = 0; i < pattern.size(); ++i) {
    const unsigned char c = static_cast<unsigned char>(pattern[i]);
    if (c < 0x20 || c == '"' || c == '.' || c == '[') return true;
    if (c != '\\') continue;
    if (++i == pattern.size() || kPlainEscapes.find(pattern[i]) == std::string_view::npos) {
      return true;
    }
  }
  return false;
}

class Checker {
 public:
  absl::Status Check(dom::element root) {
    RETURN_IF_ERROR(CheckSchemaAt(root, "#"));
    return CheckReferences();
  }

 private:
  template <typename... Parts>
  static absl::Status Refuse(const std::string& place, const Parts&... parts) {
    return absl::InvalidArgumentError(absl::StrCat("schema at ", place, ": ", parts...));
  }
  static absl::Status NotSupported(const std::string& place, std::string_view what) {
    return Refuse(place, std::string(what), " is not supported");
  }

  absl::StatusOr<Fields> FieldsOf(dom::element element, const std::string& place) {
    dom::object object;
    if (element.get(object)) return Refuse(place, "expected an object");
    Fields fields;
    absl::flat_hash_set<std::string_view> seen;
    for (const dom::key_value_pair field : object) {
      if (!seen.insert(field.key).second) {
        return Refuse(place, "'", std::string(field.key), "' is there twice");
      }
      fields.emplace_back(field.key, field.value);
    }
    return fields;
  }

  absl::Status CheckSchemaAt(dom::element schema, const std::string& place) {
    places_.insert(place);
    if (schema.is_bool()) return absl::OkStatus();
    ASSIGN_OR_RETURN(const Fields fields, FieldsOf(schema, place));
    for (const std::string_view keyword : kUnsupported) {
      if (Find(fields, keyword) != nullptr) return NotSupported(place, keyword);
    }
    const dom::element* const unique = Find(fields, "uniqueItems");
    bool is_unique = true;
    if (unique != nullptr && (unique->get(is_unique) || is_unique)) {
      return NotSupported(place, "uniqueItems");
    }
    if (place != "#" && Find(fields, "$id") != nullptr) return NotSupported(place, "$id");
    RETURN_IF_ERROR(CheckDefinitions(fields, place));

    const auto alone = std::find_if(kAlone.begin(), kAlone.end(), [&](std::string_view keyword) {
      return Find(fields, keyword) != nullptr;
    });
    if (alone != kAlone.end()) return CheckAlone(fields, *alone, place);
    RETURN_IF_ERROR(CheckTypes(fields, place));
    RETURN_IF_ERROR(CheckNumbers(fields, place));
    RETURN_IF_ERROR(CheckCounts(fields, place));
    RETURN_IF_ERROR(CheckPatterns(fields, place));
    return CheckParts(fields, place);
  }

  static absl::Status CheckNumbers(const Fields& fields, const std::string& place) {
    const dom::element* const type = Find(fields, "type");
    std::string_view word;
    const bool may_be_integer = type != nullptr && (type->get(word) || word == "integer");
    for (const std::string_view keyword : kNumbers) {
      const dom::element* const found = Find(fields, keyword);
      if (found == nullptr) continue;
      double number = 0;
      if (found->get(number)) return Refuse(place, std::string(keyword), " must be a number");
      if (keyword == "multipleOf" && number <= 0) {
        return Refuse(place, "multipleOf must be above 0, got ", number);
      }
      if (may_be_integer && std::abs(number) >= kTooLarge) {
        return Refuse(place, std::string(keyword), " of integers must be within 64 bits, got ",
                      number);
      }
    }
    double minimum = 0, maximum = 0;
    const dom::element* const least = Find(fields, "minimum");
    const dom::element* const most = Find(fields, "maximum");
    if (least == nullptr || most == nullptr) return absl::OkStatus();
    if (!least->get(minimum) && !most->get(maximum) && minimum > maximum) {
      return Refuse(place, "minimum ", minimum, " is above maximum ", maximum);
    }
    return absl::OkStatus();
  }

  static absl::Status CheckCounts(const Fields& fields, const std::string& place) {
    for (const Counts& counts : kCounts) {
      int64_t least = 0, most = kMostCounted;
      for (const auto& [keyword, value] : {std::pair(counts.least, &least), {counts.most, &most}}) {
        const dom::element* const found = Find(fields, keyword);
        if (found != nullptr && (found->get(*value) || *value < 0)) {
          return Refuse(place, std::string(keyword), " must be a whole number of at least 0, got ",
                        simdjson::minify(*found));
        }
      }
      if (least > kMostCounted) {
        return Refuse(place, std::string(counts.least), " must be at most ", kMostCounted);
      }
      if (least > most) {
        return Refuse(place, std::string(counts.least), " ", least, " is above ",
                      std::string(counts.most), " ", most);
      }
    }
    return absl::OkStatus();
  }

  static absl::Status Unwieldy(const std::string& place, std::string_view pattern) {
    return Refuse(place, "the pattern '", std::string(pattern),
                  "' has characters beyond ASCII; beside those '.', '[', '\"' and escapes other "
                  "than \\d, \\w and of punctuation are not supported");
  }

  static absl::Status CheckPatterns(const Fields& fields, const std::string& place) {
    std::string_view text;
    for (const std::string_view keyword : {"pattern", "format"}) {
      const dom::element* const found = Find(fields, keyword);
      if (found == nullptr) continue;
      if (found->get(text)) return Refuse(place, std::string(keyword), " must be a string");
      if (keyword == "pattern" && MayLeaveJson(text)) return Unwieldy(place, text);
    }
    dom::object properties;
    const dom::element* const names = Find(fields, "patternProperties");
    if (names == nullptr || names->get(properties)) return absl::OkStatus();
    for (const dom::key_value_pair field : properties) {
      if (MayLeaveJson(field.key)) return Unwieldy(place, field.key);
    }
    return absl::OkStatus();
  }

  absl::Status CheckDefinitions(const Fields& fields, const std::string& place) {
    for (const std::string_view keyword : {"$defs", "definitions"}) {
      const dom::element* const found = Find(fields, keyword);
      if (found != nullptr) RETURN_IF_ERROR(CheckMap(*found, Below(place, keyword)));
    }
    return absl::OkStatus();
  }

  // Of a schema with the keyword `alone`.
  absl::Status CheckAlone(const Fields& fields, std::string_view alone, const std::string& place) {
    const bool is_value = alone == "const" || alone == "enum";
    for (const auto& [key, value] : fields) {
      if (key == alone || (is_value && key == "type")) continue;
      const bool asserts =
          key == "type" || std::find(kAlone.begin(), kAlone.end(), key) != kAlone.end() ||
          std::any_of(std::begin(kTypeKeywords), std::end(kTypeKeywords),
                      [key = key](const TypeKeyword& other) { return other.keyword == key; });
      if (asserts) {
        return NotSupported(
            place, absl::StrCat("'", std::string(key), "' beside '", std::string(alone), "'"));
      }
    }
    const dom::element& value = *Find(fields, alone);
    if (alone == "$ref") return AddReference(value, place);
    if (is_value) return CheckValues(fields, value, alone, place);
    return CheckList(value, Below(place, alone));
  }

  absl::Status AddReference(dom::element value, const std::string& place) {
    std::string_view target;
    if (value.get(target)) return Refuse(place, "$ref must be a string");
    references_.emplace_back(place, std::string(target));
    return absl::OkStatus();
  }

  // const and enum: every value has the type that is named, if one is.
  absl::Status CheckValues(const Fields& fields, dom::element value, std::string_view keyword,
                           const std::string& place) {
    std::vector<dom::element> values = {value};
    if (keyword == "enum") {
      dom::array list;
      if (value.get(list)) return Refuse(place, "enum must be a list");
      values.assign(list.begin(), list.end());
      if (values.size() > kMaxEnumValues) {
        return Refuse(place, "enum has ", values.size(), " values, limit ", kMaxEnumValues);
      }
    }
    const dom::element* const type = Find(fields, "type");
    if (type == nullptr) return absl::OkStatus();
    ASSIGN_OR_RETURN(const std::vector<std::string_view> types, TypesOf(*type, place));
    for (const dom::element each : values) {
      if (std::none_of(types.begin(), types.end(),
                       [&](std::string_view name) { return IsOfType(each, name); })) {
        return Refuse(place, "a value of ", std::string(keyword), " is not of the type");
      }
    }
    return absl::OkStatus();
  }

  static absl::StatusOr<std::vector<std::string_view>> TypesOf(dom::element type,
                                                               const std::string& place) {
    std::vector<std::string_view> types;
    std::string_view name;
    dom::array list;
    if (!type.get(name)) {
      types.push_back(name);
    } else if (!type.get(list)) {
      for (const dom::element each : list) {
        if (each.get(name)) return Refuse(place, "type must be a string or a list of strings");
        types.push_back(name);
      }
    }
    if (types.empty()) return Refuse(place, "type must be a string or a list of strings");
    for (const std::string_view each : types) {
      if (std::find(kTypes.begin(), kTypes.end(), each) != kTypes.end()) continue;
      return Refuse(place, "'", std::string(each), "' is no type, expected string, number, ",
                    "integer, boolean, null, object or array");
    }
    return types;
  }

  absl::Status CheckTypes(const Fields& fields, const std::string& place) {
    if (const dom::element* const type = Find(fields, "type")) {
      return TypesOf(*type, place).status();
    }
    std::optional<std::string_view> implied;
    for (const std::string_view keyword : kImplyType) {
      if (!implied && Find(fields, keyword) != nullptr) {
        implied = std::find_if(std::begin(kTypeKeywords), std::end(kTypeKeywords),
                               [&](const TypeKeyword& k) { return k.keyword == keyword; })
                      ->type;
      }
    }
    for (const TypeKeyword& keyword : kTypeKeywords) {
      if (Find(fields, keyword.keyword) == nullptr || keyword.type == implied) continue;
      if (implied) continue;  // it is not about objects, or not about arrays
      return Refuse(place, "'", std::string(keyword.keyword),
                    "' is supported only beside a 'type'");
    }
    return absl::OkStatus();
  }

  absl::Status CheckParts(const Fields& fields, const std::string& place) {
    for (const std::string_view keyword : {"items", "unevaluatedItems", "additionalProperties",
                                           "unevaluatedProperties", "propertyNames"}) {
      const dom::element* const found = Find(fields, keyword);
      if (found != nullptr) RETURN_IF_ERROR(CheckSchemaAt(*found, Below(place, keyword)));
    }
    if (const dom::element* const found = Find(fields, "prefixItems")) {
      RETURN_IF_ERROR(CheckList(*found, Below(place, "prefixItems")));
    }
    for (const std::string_view keyword : {"properties", "patternProperties"}) {
      const dom::element* const found = Find(fields, keyword);
      if (found != nullptr) RETURN_IF_ERROR(CheckMap(*found, Below(place, keyword)));
    }
    return CheckObject(fields, place);
  }

  // xgrammar keeps the names of `properties` out of what other names may have only if they are
  // written as they stand, does not look for what a pattern and a name have in common, and counts a
  // property that is there twice as two.
  static absl::Status CheckNames(const Fields& fields, const std::string& place) {
    const auto names_of = [&](std::string_view keyword) {
      std::vector<std::string_view> names;
      dom::object object;
      const dom::element* const found = Find(fields, keyword);
      if (found == nullptr || found->get(object)) return names;
      for (const dom::key_value_pair field : object) names.push_back(field.key);
      return names;
    };
    const auto lets_in_others = [&](std::string_view keyword) {
      bool any = true;
      const dom::element* const found = Find(fields, keyword);
      return found != nullptr && (found->get(any) || any);
    };
    const std::vector<std::string_view> names = names_of("properties");
    const size_t num_patterns = names_of("patternProperties").size();
    const bool names_have_schema = Find(fields, "propertyNames") != nullptr;
    const bool has_others =
        lets_in_others("additionalProperties") || lets_in_others("unevaluatedProperties");
    if (num_patterns > 1) return NotSupported(place, "more than one pattern in patternProperties");
    if (!names.empty() && num_patterns > 0) {
      return NotSupported(place, "'patternProperties' beside 'properties'");
    }
    if (!names.empty() && names_have_schema) {
      return NotSupported(place, "'propertyNames' beside 'properties'");
    }
    const auto is_plain = [](char c) { return c >= 0x20 && c <= 0x7e && c != '"' && c != '\\'; };
    for (const std::string_view name : names) {
      if (has_others && !std::all_of(name.begin(), name.end(), is_plain)) {
        return NotSupported(
            place, absl::StrCat("a property whose name is not plain ASCII ('", std::string(name),
                                "') beside 'additionalProperties'"));
      }
    }
    uint64_t least = 0;
    const dom::element* const found = Find(fields, "minProperties");
    const bool are_free = has_others || num_patterns > 0 || names_have_schema;
    if (are_free && found != nullptr && !found->get(least) && least > 1) {
      return NotSupported(place, "minProperties above 1 where names are free");
    }
    return absl::OkStatus();
  }

  absl::Status CheckObject(const Fields& fields, const std::string& place) {
    RETURN_IF_ERROR(CheckNames(fields, place));
    const dom::element* const required = Find(fields, "required");
    if (required == nullptr) return absl::OkStatus();
    dom::array names;
    if (required->get(names)) return Refuse(place, "required must be a list of strings");
    dom::object properties;
    const dom::element* const found = Find(fields, "properties");
    const bool has_properties = found != nullptr && !found->get(properties);
    for (const dom::element each : names) {
      std::string_view name;
      if (each.get(name)) return Refuse(place, "required must be a list of strings");
      dom::element unused;
      if (!has_properties || properties.at_key(name).get(unused)) {
        return Refuse(place, "'", std::string(name),
                      "' is required, but not one of the properties");
      }
    }
    return absl::OkStatus();
  }

  absl::Status CheckList(dom::element list, const std::string& place) {
    dom::array array;
    if (list.get(array)) return Refuse(place, "expected a list of schemas");
    size_t index = 0;
    for (const dom::element schema : array) {
      RETURN_IF_ERROR(CheckSchemaAt(schema, absl::StrCat(place, "/", index++)));
    }
    return absl::OkStatus();
  }

  absl::Status CheckMap(dom::element map, const std::string& place) {
    ASSIGN_OR_RETURN(const Fields fields, FieldsOf(map, place));
    for (const auto& [name, schema] : fields) {
      RETURN_IF_ERROR(CheckSchemaAt(schema, Below(place, name)));
    }
    return absl::OkStatus();
  }

  // Every reference names a schema that was checked, and no chain of them is a circle.
  absl::Status CheckReferences() {
    absl::flat_hash_map<std::string, std::string> next;
    for (const auto& [place, target] : references_) {
      if (!places_.contains(target)) {
        return Refuse(place, "$ref '", target, "' names no schema in here, expected the like of ",
                      "'#/$defs/name'");
      }
      next[place] = target;
    }
    for (const auto& [place, target] : references_) {
      std::string at = target;
      for (size_t steps = 0; next.contains(at); at = next[at]) {
        if (++steps > references_.size()) return Refuse(place, "$ref goes round in a circle");
      }
    }
    return absl::OkStatus();
  }

  static std::string Below(const std::string& place, std::string_view token) {
    return absl::StrCat(place, "/", EscapeToken(token));
  }

  absl::flat_hash_set<std::string> places_;
  std::vector<std::pair<std::string, std::string>> references_;  // place, target
};

// How much deeper than its schemas a structural tag may nest.
constexpr size_t kMaxTagDepth = 64;

absl::Status Parse(std::string_view json, size_t max_depth, const std::string& what,
                   dom::parser& parser, dom::element& root) {
  simdjson::error_code error = parser.allocate(json.size(), max_depth);
  if (!error) error = parser.parse(json.data(), json.size(), true).get(root);
  if (error == simdjson::DEPTH_ERROR) {
    return absl::InvalidArgumentError(
        absl::StrCat("the ", what, " nests deeper than ", max_depth, " levels"));
  }
  if (error) {
    return absl::InvalidArgumentError(
        absl::StrCat("the ", what, " is not valid JSON: ", simdjson::error_message(error)));
  }
  return absl::OkStatus();
}

absl::Status CheckSchemasIn(dom::element node) {
  dom::array list;
  if (!node.get(list)) {
    for (const dom::element each : list) RETURN_IF_ERROR(CheckSchemasIn(each));
    return absl::OkStatus();
  }
  dom::object object;
  if (node.get(object)) return absl::OkStatus();
  for (const dom::key_value_pair field : object) {
    std::string_view word;
    const bool is_word = !field.value.get(word);
    if ((field.key == "style" && !(is_word && word == "json")) ||
        (field.key == "type" && is_word && word == "qwen_xml_parameter")) {
      return absl::InvalidArgumentError("in a structural tag a schema's value is written as JSON");
    }
    if (field.key == "json_schema") {
      RETURN_IF_ERROR(CheckSchema(simdjson::minify(field.value)));
    } else {
      RETURN_IF_ERROR(CheckSchemasIn(field.value));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckSchema(std::string_view schema) {
  dom::parser parser;
  dom::element root;
  RETURN_IF_ERROR(Parse(schema, kMaxSchemaDepth, "schema", parser, root));
  return Checker().Check(root);
}

absl::Status CheckStructuralTag(std::string_view tag) {
  dom::parser parser;
  dom::element root;
  RETURN_IF_ERROR(Parse(tag, kMaxTagDepth + kMaxSchemaDepth, "structural tag", parser, root));
  return CheckSchemasIn(root);
}

}  // namespace fathom
