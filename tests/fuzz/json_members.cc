// Any bytes as a call's arguments: what Python's JSON makes of them is JSON again, and the same.
#include <cstdint>
#include <string>
#include <string_view>

#include "base/check.h"
#include "gateway/text/python_json.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  simdjson::dom::parser parser;
  simdjson::dom::element root;
  if (parser.parse(text.data(), text.size()).get(root)) return 0;
  const std::string once = fathom::PythonJson(root);
  simdjson::dom::parser again;
  CHECK(!again.parse(once).get(root)) << once;
  CHECK(fathom::PythonJson(root) == once);
  const auto members = fathom::ReadJsonMembers(text);
  CHECK(members.ok() == root.is_object());
  if (!members.ok()) return 0;
  for (const fathom::JsonMember& member : *members) {
    CHECK(member.is_string || fathom::IsJson(member.value)) << member.value;
  }
  return 0;
}
