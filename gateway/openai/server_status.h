// GET /health, /live, /load, /version and /metrics.
#pragma once

#include "gateway/http/handler.h"
#include "gateway/openai/api.h"

namespace fathom {

// 200 with an empty body only when the coordinator can make steps; else 503 saying why not. Also
// answers /ready and /ping.
class HealthHandler : public Handler {
 public:
  explicit HealthHandler(const Api& api) : api_(api) {}
  Task<> Handle(const HttpRequest& request, ResponseWriter& writer) override;

 private:
  Api api_;
};

// 200: this process answers. For liveness probes; /health is for readiness.
class LiveHandler : public Handler {
 public:
  Task<> Handle(const HttpRequest& request, ResponseWriter& writer) override;
};

// {"server_load": requests that are being answered by this gateway}.
class LoadHandler : public Handler {
 public:
  explicit LoadHandler(const Api& api) : api_(api) {}
  Task<> Handle(const HttpRequest& request, ResponseWriter& writer) override;

 private:
  Api api_;
};

class VersionHandler : public Handler {
 public:
  explicit VersionHandler(const Api& api) : api_(api) {}
  Task<> Handle(const HttpRequest& request, ResponseWriter& writer) override;

 private:
  Api api_;
};

// The gateway's series, and the coordinator's when it can be reached.
class MetricsHandler : public Handler {
 public:
  explicit MetricsHandler(const Api& api) : api_(api) {}
  Task<> Handle(const HttpRequest& request, ResponseWriter& writer) override;

 private:
  Api api_;
};

}  // namespace fathom
