// One line in the log, and the HTTP series, for each request.
#pragma once

#include <string>
#include <string_view>

#include "gateway/http/server.h"
#include "gateway/openai/metrics.h"

namespace fathom {

class RequestLog : public RequestObserver {
 public:
  // `metrics` must outlive this.
  explicit RequestLog(GatewayMetrics& metrics) : metrics_(metrics) {}

  // Logs at info; probes and scrapes that succeed at debug. They are not in the series either.
  void OnRequestEnd(const RequestRecord& record) override;

 private:
  GatewayMetrics& metrics_;
};

// `text` with everything but printable ASCII as \xNN, cut after `max_bytes`: what a client sends
// cannot forge a line of the log.
std::string EscapedForLog(std::string_view text, size_t max_bytes);

}  // namespace fathom
