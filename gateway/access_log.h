// The access log for machines: one JSON object a line, one line a request, appended to a file.
//
//   {"time":"2026-11-29T20:15:03.123Z","request_id":…,"trace_id":…,"client":…,"caller":…,
//    "method":…,"path":…,"route":…,"status":200,"duration_ms":12.3,"complete":true,
//    "response_id":…,"prompt_tokens":…,"completion_tokens":…}
//
// Whatever a client sends is a JSON string here, with everything escaped that anybody takes for
// a control character or the end of a line: it cannot forge one. No prompt, no answer and no key is
// ever written. A line that cannot be written (disk full) is dropped and counted; requests go on.
// I/O thread only.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "gateway/http/server.h"

namespace fathom {

class AccessLog {
 public:
  // Writes nothing until opened.
  AccessLog() = default;
  ~AccessLog();
  AccessLog(const AccessLog&) = delete;
  AccessLog& operator=(const AccessLog&) = delete;

  // Opens or creates `file` to append to it. Again for the same name after it was moved away.
  // InvalidArgument says why it cannot; then it goes on with the one it had.
  absl::Status Open(const std::string& file);

  void Write(const RequestRecord& record);

  int64_t num_dropped() const { return num_dropped_; }

 private:
  int fd_ = -1;
  int64_t num_dropped_ = 0;
};

// The line for a request, with its end.
std::string AccessLogLine(const RequestRecord& record, int64_t unix_milliseconds);

}  // namespace fathom
