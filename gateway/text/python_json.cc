#include "gateway/text/python_json.h"

#include <charconv>
#include <cmath>
#include <cstdlib>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"

namespace fathom {
namespace {

namespace dom = simdjson::dom;

// Python's repr of a finite number: the shortest digits that read back as the same value, with an
// exponent below 1e-4 and from 1e16 on.
std::string PythonFloat(double number) {
  char buffer[40];
  const auto end =
      std::to_chars(buffer, buffer + sizeof(buffer), number, std::chars_format::scientific).ptr;
  const std::string_view scientific(buffer, end - buffer);
  const size_t e = scientific.find('e');
  const int exponent = std::atoi(std::string(scientific.substr(e + 1)).c_str());
  if (exponent < -4 || exponent >= 16) return std::string(scientific);
  const auto fixed_end =
      std::to_chars(buffer, buffer + sizeof(buffer), number, std::chars_format::fixed).ptr;
  std::string fixed(buffer, fixed_end);
  if (fixed.find('.') == std::string::npos) fixed += ".0";
  return fixed;
}

void AppendPython(dom::element value, std::string& json);

void AppendString(std::string_view text, std::string& json) {
  json += '"';
  AppendJsonEscaped(text, json);
  json += '"';
}

using Members = std::vector<std::pair<std::string_view, dom::element>>;

Members MembersOf(dom::object object) {
  Members members;
  absl::flat_hash_map<std::string_view, size_t> places;
  for (const auto& [key, value] : object) {
    const auto [place, is_new] = places.try_emplace(key, members.size());
    if (is_new) {
      members.emplace_back(key, value);
    } else {
      members[place->second].second = value;
    }
  }
  return members;
}

void AppendObject(dom::object object, std::string& json) {
  const Members members = MembersOf(object);
  json += '{';
  for (size_t i = 0; i < members.size(); ++i) {
    if (i > 0) json += ", ";
    AppendString(members[i].first, json);
    json += ": ";
    AppendPython(members[i].second, json);
  }
  json += '}';
}

void AppendArray(dom::array array, std::string& json) {
  json += '[';
  bool is_first = true;
  for (const dom::element element : array) {
    if (!std::exchange(is_first, false)) json += ", ";
    AppendPython(element, json);
  }
  json += ']';
}

// The depth is bounded by the parser's.
void AppendPython(dom::element value, std::string& json) {
  switch (value.type()) {
    case dom::element_type::OBJECT:
      return AppendObject(dom::object(value), json);
    case dom::element_type::ARRAY:
      return AppendArray(dom::array(value), json);
    case dom::element_type::STRING:
      return AppendString(std::string_view(value), json);
    case dom::element_type::INT64:
      return absl::StrAppend(&json, int64_t(value));
    case dom::element_type::UINT64:
      return absl::StrAppend(&json, uint64_t(value));
    case dom::element_type::DOUBLE:
      json += PythonFloat(double(value));
      return;
    case dom::element_type::BOOL:
      json += bool(value) ? "true" : "false";
      return;
    default:
      json += "null";
  }
}

}  // namespace

std::string PythonJson(dom::element value) {
  std::string json;
  AppendPython(value, json);
  return json;
}

absl::StatusOr<std::vector<JsonMember>> ReadJsonMembers(std::string_view text) {
  dom::parser parser;
  dom::element root;
  dom::object object;
  if (parser.parse(text.data(), text.size()).get(root) || root.get(object)) {
    return absl::InvalidArgumentError("is not a JSON object");
  }
  std::vector<JsonMember> members;
  for (const auto& [key, value] : MembersOf(object)) {
    std::string_view string;
    const bool is_string = !value.get(string);
    members.push_back(
        {std::string(key), is_string, is_string ? std::string(string) : PythonJson(value)});
  }
  return members;
}

bool IsJson(std::string_view text) {
  dom::parser parser;
  dom::element root;
  return !parser.parse(text.data(), text.size()).get(root);
}

void AppendJsonEscaped(std::string_view text, std::string& json) {
  constexpr char kHex[] = "0123456789abcdef";
  for (const char c : text) {
    switch (c) {
      case '"':
        json += "\\\"";
        break;
      case '\\':
        json += "\\\\";
        break;
      case '\n':
        json += "\\n";
        break;
      case '\r':
        json += "\\r";
        break;
      case '\t':
        json += "\\t";
        break;
      case '\b':
        json += "\\b";
        break;
      case '\f':
        json += "\\f";
        break;
      default:
        if (static_cast<uint8_t>(c) >= 0x20) {
          json += c;
        } else {
          json += "\\u00";
          json += kHex[c >> 4];
          json += kHex[c & 15];
        }
    }
  }
}

}  // namespace fathom
