// GET /: what an operator wants to see at a glance, as one HTML page without scripts or anything
// from elsewhere. It loads itself anew every few seconds.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "gateway/http/handler.h"
#include "gateway/openai/api.h"
#include "gateway/openai/load_history.h"
#include "gateway/openai/recent_values.h"
#include "proto/generate.pb.h"

namespace fathom {

// Everything that the page shows.
struct StatusPageData {
  std::string version;
  std::vector<std::string> model_names;
  std::optional<v1::ModelInfo> model;    // absent: not known yet
  std::optional<v1::ServerInfo> server;  // absent: the coordinator cannot be reached
  std::string metrics_text;              // the coordinator's; "" with it
  std::deque<LoadHistory::Sample> history;
  RecentValues::Quantiles first_tokens;  // seconds, of the last minute
  RecentValues::Quantiles inter_tokens;
  int num_in_flight = 0;  // in this gateway
};

// Whatever it shows is escaped.
std::string StatusPage(const StatusPageData& data);

class StatusPageHandler : public Handler {
 public:
  explicit StatusPageHandler(const Api& api) : api_(api) {}
  Task<> Handle(const HttpRequest& request, ResponseWriter& writer) override;

 private:
  Api api_;
};

}  // namespace fathom
