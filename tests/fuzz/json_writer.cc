// Any values, written as an event of a stream: one line of JSON that reads back as the same.
//
// Each byte is what to write next; what a string holds, or a number's bits, follows.
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "gateway/openai/json_fields.h"
#include "gateway/openai/json_writer.h"

namespace fathom {
namespace {

constexpr size_t kMaxDepth = 32;

class Writing {
 public:
  explicit Writing(std::string_view bytes) : bytes_(bytes) {}

  std::string Text() {
    json_.BeginArray();
    while (!bytes_.empty()) WriteNext();
    while (!is_object_.empty()) Close();
    json_.EndArray();
    return json_.Take();
  }

 private:
  std::string_view Take(size_t size) {
    const std::string_view taken = bytes_.substr(0, size);
    bytes_.remove_prefix(taken.size());
    return taken;
  }

  template <typename Number>
  Number TakeNumber() {
    Number number = 0;
    const std::string_view taken = Take(sizeof(number));
    std::memcpy(&number, taken.data(), taken.size());
    return number;
  }

  void Open(bool is_object) {
    if (is_object_.size() == kMaxDepth) return;
    KeyIfWanted();
    is_object ? json_.BeginObject() : json_.BeginArray();
    is_object_.push_back(is_object);
  }

  void Close() {
    is_object_.back() ? json_.EndObject() : json_.EndArray();
    is_object_.pop_back();
  }

  void KeyIfWanted() {
    if (!is_object_.empty() && is_object_.back()) json_.Key(Take(TakeNumber<uint8_t>() % 8));
  }

  void WriteNext() {
    switch (const uint8_t what = TakeNumber<uint8_t>(); what % 8) {
      case 0:
      case 1:
        return Open(what % 8 == 1);
      case 2:
        if (!is_object_.empty()) Close();
        return;
      case 3:
        KeyIfWanted();
        json_.Int(TakeNumber<int64_t>());
        return;
      case 4:
        KeyIfWanted();
        json_.Float(TakeNumber<float>());
        return;
      case 5:
        KeyIfWanted();
        what >= 0x80 ? json_.Null() : json_.Bool(what >= 0x40);
        return;
      default:
        KeyIfWanted();
        json_.String(Take(what / 8));
    }
  }

  std::string_view bytes_;
  JsonWriter json_;
  std::vector<bool> is_object_;
};

// What was read, written again.
void Copy(simdjson::dom::element element, JsonWriter& json) {
  if (element.is_array()) {
    json.BeginArray();
    for (const simdjson::dom::element child : simdjson::dom::array(element)) Copy(child, json);
    json.EndArray();
  } else if (element.is_object()) {
    json.BeginObject();
    for (const auto [key, value] : simdjson::dom::object(element)) {
      json.Key(key);
      Copy(value, json);
    }
    json.EndObject();
  } else if (element.is_string()) {
    json.String(std::string_view(element));
  } else if (element.is_int64()) {
    json.Int(int64_t(element));
  } else if (element.is_double()) {
    json.Float(static_cast<float>(double(element)));
  } else if (element.is_bool()) {
    json.Bool(bool(element));
  } else {
    CHECK(element.is_null());
    json.Null();
  }
}

}  // namespace
}  // namespace fathom

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fathom::Writing writing({reinterpret_cast<const char*>(data), size});
  const std::string text = writing.Text();
  CHECK(text.find('\n') == text.npos && text.find('\r') == text.npos) << text;  // the event's end
  const auto document = fathom::JsonDocument::Parse(text, fathom::kMaxDepth + 2);
  CHECK(document.ok()) << document.status() << " " << text;
  fathom::JsonWriter again;
  fathom::Copy(document->root(), again);
  CHECK(again.text() == text) << text;
  return 0;
}
