#include "deploy/launcher/log_output.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <functional>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace fathom {
namespace {

constexpr absl::string_view kEraseLine = "\r\033[K";

// A colour per process, the same in every run.
absl::string_view ColourOf(absl::string_view process) {
  static constexpr std::array<absl::string_view, 6> kColours = {"\033[36m", "\033[32m", "\033[35m",
                                                                "\033[34m", "\033[33m", "\033[96m"};
  if (process == "fathom") return "\033[1m";
  size_t sum = 0;
  for (const char c : process) sum = sum * 31 + static_cast<unsigned char>(c);
  return kColours[sum % kColours.size()];
}

}  // namespace

bool TellsProgress(absl::string_view line) {
  const size_t loading = line.find("oading");
  return loading != absl::string_view::npos && line.find(" %", loading) != absl::string_view::npos;
}

absl::string_view WithoutLogPrefix(absl::string_view line) {
  constexpr size_t kPrefixBytes = sizeof("E 14:02:03.123 ") - 1;
  const bool has_prefix = line.size() > kPrefixBytes && line[1] == ' ' && line[4] == ':' &&
                          line[7] == ':' && line[10] == '.';
  return has_prefix ? line.substr(kPrefixBytes) : line;
}

LogOutput::~LogOutput() {
  if (progress_is_shown_) Write("\n");
}

void LogOutput::Line(absl::string_view process, absl::string_view text) {
  const absl::string_view erase = progress_is_shown_ ? kEraseLine : "";
  progress_is_shown_ = false;
  Write(absl::StrCat(erase, Prefixed(process, text), "\n"));
}

void LogOutput::FromChild(absl::string_view process, absl::string_view text) {
  if (!options_.is_terminal || !TellsProgress(text)) return Line(process, text);
  const size_t room = std::max(options_.columns - options_.name_width - 4, 20);
  Write(absl::StrCat(kEraseLine, Prefixed(process, text.substr(0, room))));
  progress_is_shown_ = true;
}

std::string LogOutput::Prefixed(absl::string_view process, absl::string_view text) const {
  std::string line = absl::StrCat(options_.use_colours ? ColourOf(process) : "", process);
  const size_t width = options_.name_width;
  if (process.size() < width) line.append(width - process.size(), ' ');
  absl::StrAppend(&line, " |", options_.use_colours ? "\033[0m " : " ");
  for (const char c : absl::StripSuffix(text, "\r")) {
    const bool control = (static_cast<unsigned char>(c) < 0x20 && c != '\t') || c == 0x7f;
    line.push_back(control ? '?' : c);
  }
  return line;
}

void LogOutput::Write(absl::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t count = write(options_.fd, bytes.data(), bytes.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return;  // nobody listens: serving goes on
    bytes.remove_prefix(count);
  }
}

}  // namespace fathom
