#include "gateway/request_log.h"

#include <algorithm>
#include <array>
#include <chrono>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "spdlog/spdlog.h"

namespace fathom {
namespace {

constexpr size_t kMaxShownBytes = 256;

bool IsRoutine(std::string_view pattern) {
  constexpr std::array<std::string_view, 8> kProbes = {"/health", "/ready",   "/ping",    "/live",
                                                       "/load",   "/metrics", "/version", "/"};
  return std::find(kProbes.begin(), kProbes.end(), pattern) != kProbes.end();
}

}  // namespace

std::string EscapedForLog(std::string_view text, size_t max_bytes) {
  std::string escaped;
  for (const unsigned char c : text.substr(0, max_bytes)) {
    if (c >= 0x20 && c < 0x7F && c != '\\' && c != '"') {
      escaped += static_cast<char>(c);
    } else {
      absl::StrAppend(&escaped, "\\x", absl::Hex(c, absl::kZeroPad2));
    }
  }
  if (text.size() > max_bytes) escaped += "...";
  return escaped;
}

void RequestLog::OnRequestEnd(const RequestRecord& record) {
  const double seconds = std::chrono::duration<double>(record.duration).count();
  const bool probe = IsRoutine(record.pattern);
  if (!probe) metrics_.OnHttpRequest(record.method, record.pattern, record.status, seconds);
  if (!probe || record.status != 200) {
    access_log_.Write(record);
    metrics_.SetDroppedLogLines(access_log_.num_dropped());
  }
  std::string line =
      absl::StrFormat("%s \"%s %s\" %d %.1f ms", std::string(record.client),
                      EscapedForLog(record.method, kMaxShownBytes),
                      EscapedForLog(record.path, kMaxShownBytes), record.status, seconds * 1e3);
  const RequestNotes& notes = *record.notes;
  absl::StrAppend(&line, " ", notes.id.empty() ? std::string(record.id) : notes.id);
  if (!record.caller.empty()) absl::StrAppend(&line, " of ", std::string(record.caller));
  if (notes.prompt_tokens > 0) {
    absl::StrAppend(&line, " prompt_tokens=", notes.prompt_tokens,
                    " completion_tokens=", notes.completion_tokens);
  }
  if (!record.complete) line += " client went away";
  if (probe) {
    spdlog::debug("{}", line);
  } else {
    spdlog::info("{}", line);
  }
}

}  // namespace fathom
