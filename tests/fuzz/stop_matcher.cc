// Any text, any stop strings: the same as searching in the whole text, however it is cut.
//
// The first byte is the seed of the cuts, the second the number of stop strings; those end with a
// zero byte each.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "gateway/text/stop_matcher.h"

namespace fathom {
namespace {

struct Shown {
  std::string text;
  std::optional<size_t> stop_bytes;  // of the stop string that was found
};

// By definition: the stop string that is complete first, of those the longest.
Shown Search(const std::vector<std::string>& stops, StopString stop_string, std::string_view text) {
  for (size_t end = 0; end <= text.size(); ++end) {
    size_t longest = 0;
    for (const std::string& stop : stops) {
      if (text.substr(0, end).ends_with(stop)) longest = std::max(longest, stop.size());
    }
    if (longest == 0) continue;
    const size_t shown = stop_string == StopString::kInclude ? end : end - longest;
    return {std::string(text.substr(0, shown)), longest};
  }
  return {std::string(text), std::nullopt};
}

void Check(const uint8_t* data, size_t size) {
  if (size < 2) return;
  std::mt19937_64 random(data[0]);
  std::string_view rest(reinterpret_cast<const char*>(data) + 2, size - 2);
  std::vector<std::string> stops;
  for (int i = 0; i < data[1] % 8; ++i) {
    const size_t end = std::min(rest.find('\0'), rest.size());
    if (end > 0) stops.emplace_back(rest.substr(0, end));
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
  const StopString stop_string = data[1] & 0x80 ? StopString::kInclude : StopString::kLeaveOut;
  const Shown wanted = Search(stops, stop_string, rest);
  StopMatcher matcher(stops, stop_string);
  std::string shown;
  while (!rest.empty()) {
    const std::string_view piece = rest.substr(0, 1 + random() % 8);
    shown += matcher.Push(piece);
    rest.remove_prefix(piece.size());
  }
  shown += matcher.Finish();
  CHECK(shown == wanted.text);
  CHECK_EQ(matcher.stopped().has_value(), wanted.stop_bytes.has_value());
  if (matcher.stopped()) CHECK_EQ(stops[*matcher.stopped()].size(), *wanted.stop_bytes);
}

}  // namespace
}  // namespace fathom

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fathom::Check(data, size);
  return 0;
}
