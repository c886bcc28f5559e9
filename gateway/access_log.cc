#include "gateway/access_log.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <ctime>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "gateway/openai/json_writer.h"

namespace fathom {
namespace {

// "2026-11-29T20:15:03.123Z" (RFC 3339).
std::string TimeText(int64_t unix_milliseconds) {
  const std::time_t seconds = unix_milliseconds / 1000;
  std::tm utc;
  gmtime_r(&seconds, &utc);
  char text[32];
  const size_t size = std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%S", &utc);
  return absl::StrFormat("%s.%03dZ", std::string(text, size), unix_milliseconds % 1000);
}

// Within a JSON text: whatever some reader takes for the end of a line, or a terminal for a
// command, beyond what JSON itself escapes: DEL, U+0080 to U+009F, U+2028 and U+2029.
std::string WithoutControls(std::string_view json) {
  std::string line;
  for (size_t i = 0; i < json.size(); ++i) {
    const auto byte_at = [&](size_t at) {
      return at < json.size() ? static_cast<unsigned char>(json[at]) : 0;
    };
    const int byte = byte_at(i), next = byte_at(i + 1), third = byte_at(i + 2);
    if (byte == 0x7f) {
      line += "\\u007f";
    } else if (byte == 0xc2 && next >= 0x80 && next <= 0x9f) {
      absl::StrAppendFormat(&line, "\\u%04x", next);
      ++i;
    } else if (byte == 0xe2 && next == 0x80 && (third == 0xa8 || third == 0xa9)) {
      absl::StrAppendFormat(&line, "\\u%04x", 0x2028 + third - 0xa8);
      i += 2;
    } else {
      line += json[i];
    }
  }
  return line;
}

}  // namespace

std::string AccessLogLine(const RequestRecord& record, int64_t unix_milliseconds) {
  const RequestNotes& notes = *record.notes;
  JsonWriter json;
  json.BeginObject().Key("time").String(TimeText(unix_milliseconds));
  json.Key("request_id").String(record.id);
  if (!record.trace_id.empty()) json.Key("trace_id").String(record.trace_id);
  json.Key("client").String(record.client);
  if (!record.caller.empty()) json.Key("caller").String(record.caller);
  json.Key("method").String(record.method).Key("path").String(record.path);
  json.Key("route").String(record.pattern).Key("status").Int(record.status);
  json.Key("duration_ms").Float(std::chrono::duration<float, std::milli>(record.duration).count());
  json.Key("complete").Bool(record.complete);
  if (!notes.id.empty()) json.Key("response_id").String(notes.id);
  if (notes.prompt_tokens > 0) {
    json.Key("prompt_tokens").Int(notes.prompt_tokens);
    json.Key("completion_tokens").Int(notes.completion_tokens);
  }
  json.EndObject();
  return WithoutControls(json.text()) + "\n";
}

AccessLog::~AccessLog() {
  if (fd_ >= 0) close(fd_);
}

absl::Status AccessLog::Open(const std::string& file) {
  const int fd = open(file.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0640);
  if (fd < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("cannot open --access-log-file ", file, ": ", std::strerror(errno)));
  }
  if (fd_ >= 0) close(fd_);
  fd_ = fd;
  return absl::OkStatus();
}

void AccessLog::Write(const RequestRecord& record) {
  if (fd_ < 0) return;
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const std::string line =
      AccessLogLine(record, std::chrono::duration_cast<std::chrono::milliseconds>(now).count());
  // One write, so that lines of several writers do not mix.
  if (write(fd_, line.data(), line.size()) != static_cast<ssize_t>(line.size())) ++num_dropped_;
}

}  // namespace fathom
