#include "tests/gateway/named_events.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "gmock/gmock.h"

namespace fathom {

using ::testing::StartsWith;

NamedEvents EventsWithNames(const HttpResponse& response) {
  NamedEvents events;
  for (const std::string& chunk : response.chunks) {
    EXPECT_TRUE(chunk.ends_with("\n\n")) << chunk;
    for (const absl::string_view event : absl::StrSplit(chunk, "\n\n", absl::SkipEmpty())) {
      const std::vector<std::string> lines = absl::StrSplit(event, '\n');
      EXPECT_EQ(lines.size(), 2u) << event;
      EXPECT_THAT(lines.front(), StartsWith("event: "));
      EXPECT_THAT(lines.back(), StartsWith("data: "));
      events.emplace_back(lines.front().substr(7), lines.back().substr(6));
    }
  }
  return events;
}

std::vector<std::string> NamesOf(const NamedEvents& events) {
  std::vector<std::string> names;
  for (const auto& [name, data] : events) {
    names.push_back(name);
    EXPECT_THAT(data, StartsWith(absl::StrCat("{\"type\":\"", name, "\"")));
  }
  return names;
}

}  // namespace fathom
