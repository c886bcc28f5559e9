// One line in the log, one in the access log, and the HTTP series, for each request.
#pragma once

#include <string>
#include <string_view>

#include "gateway/access_log.h"
#include "gateway/http/server.h"
#include "gateway/openai/metrics.h"

namespace fathom {

class RequestLog : public RequestObserver {
 public:
  // Both must outlive this.
  RequestLog(GatewayMetrics& metrics, AccessLog& access_log)
      : metrics_(metrics), access_log_(access_log) {}

  // Logs at info; probes and scrapes at debug, and only those that fail in the access log. They are
  // not in the series either.
  void OnRequestEnd(const RequestRecord& record) override;

 private:
  GatewayMetrics& metrics_;
  AccessLog& access_log_;
};

// `text` with everything but printable ASCII as \xNN, cut after `max_bytes`: what a client sends
// cannot forge a line of the log.
std::string EscapedForLog(std::string_view text, size_t max_bytes);

}  // namespace fathom
