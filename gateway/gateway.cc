#include "gateway/gateway.h"

#include <utility>

#include "base/status_macros.h"
#include "gateway/access_log.h"
#include "gateway/api_keys.h"
#include "gateway/drain_guard.h"
#include "gateway/http/io_thread.h"
#include "gateway/http/router.h"
#include "gateway/openai/api.h"
#include "gateway/openai/errors.h"
#include "gateway/request_log.h"
#include "spdlog/spdlog.h"

namespace fathom {
namespace {

// For clients to read how their requests ended.
constexpr std::chrono::milliseconds kEndTimeout{500};
constexpr char kShuttingDown[] = "the server is shutting down and ended this request; try again";

// For handlers to notice that their clients were closed.
constexpr std::chrono::milliseconds kCloseTimeout{10'000};

// Of the model's files, not of the options.
absl::Status Unusable(const absl::Status& status) {
  return absl::FailedPreconditionError(std::string(status.message()));
}

}  // namespace

// Destroyed from the bottom up: the I/O thread last, since everything refers to it.
struct Gateway::Parts {
  Parts(GatewayOptions options, ModelText text, SamplingDefaults defaults)
      : options(std::move(options)),
        text(std::move(text)),
        defaults(defaults),
        api_keys(this->options.api_keys),
        drain_guard(api_keys) {}

  void Stop();    // I/O thread
  void Reload();  // I/O thread
  absl::Status OpenAccessLog();
  Task<> Drain();
  Task<> End();

  const GatewayOptions options;
  const ModelText text;
  const SamplingDefaults defaults;
  ApiKeys api_keys;
  DrainGuard drain_guard;
  AccessLog access_log;
  LoadHistory load_history;
  IoThread io_thread;
  std::unique_ptr<CoordinatorClient> coordinator;
  std::unique_ptr<ServedModel> model;
  std::unique_ptr<BackgroundThreads> text_threads;
  std::unique_ptr<GatewayMetrics> metrics;
  std::unique_ptr<RequestLog> request_log;
  Router router;
  std::unique_ptr<Server> server;
  int num_stops = 0;
};

absl::StatusOr<std::unique_ptr<Gateway>> Gateway::Create(GatewayOptions options) {
  absl::StatusOr<ModelText> loaded = ModelText::Load(options.model_dir, options.chat_encoding);
  if (!loaded.ok()) return Unusable(loaded.status());
  const absl::StatusOr<SamplingDefaults> defaults = LoadSamplingDefaults(options.model_dir);
  if (!defaults.ok()) return Unusable(defaults.status());
  ModelText& text = *loaded;
  if (text.tokenizer() == nullptr) {
    spdlog::info("{} has no tokenizer.json: serving token ids only", options.model_dir);
  } else if (const absl::Status chat = text.CheckHasChat(); !chat.ok()) {
    spdlog::info("serving without chat: {}", std::string(chat.message()));
  } else {
    spdlog::info("chats are encoded for {}", text.chat_encoder().layout().what);
  }
  auto parts = std::make_unique<Parts>(std::move(options), std::move(text), *defaults);
  Parts& p = *parts;
  ASSIGN_OR_RETURN(p.coordinator, CoordinatorClient::Create(p.options.coordinator, p.io_thread));
  p.model = std::make_unique<ServedModel>(p.options.model, *p.coordinator);
  p.text_threads = std::make_unique<BackgroundThreads>(p.options.text_threads, p.io_thread);
  p.metrics = std::make_unique<GatewayMetrics>(p.model->name());
  p.request_log = std::make_unique<RequestLog>(*p.metrics, p.access_log);
  AddRoutes({*p.coordinator, *p.model, p.text, p.defaults, p.options.limits, *p.text_threads,
             *p.metrics, p.load_history, p.options.version},
            p.router);
  p.server = std::make_unique<Server>(p.options.server, p.io_thread, p.router, p.drain_guard,
                                      *p.request_log, HttpErrorResponse);
  RETURN_IF_ERROR(p.api_keys.Load());
  RETURN_IF_ERROR(p.OpenAccessLog());
  RETURN_IF_ERROR(p.server->Start());
  p.io_thread.Spawn(p.load_history.Watch(*p.coordinator, p.io_thread), [] {});
  return std::unique_ptr<Gateway>(new Gateway(std::move(parts)));
}

Gateway::Gateway(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}

Gateway::~Gateway() = default;

uint16_t Gateway::port() const { return parts_->server->port(); }

void Gateway::Run() { parts_->io_thread.Run(); }

Task<> Gateway::Parts::Drain() {
  spdlog::info("draining: {} connections, at most {} s", server->num_connections(),
               options.drain_timeout.count() / 1000);
  drain_guard.BeginDraining();
  server->Drain();
  co_await server->WaitUntilDrained(options.drain_timeout);
  co_await End();
  co_await server->WaitUntilClosed(kCloseTimeout);
  spdlog::info("stopped");
}

Task<> Gateway::Parts::End() {
  server->EndAll(kShuttingDown);
  co_await server->WaitUntilClosed(kEndTimeout);
  server->CloseAll();
}

void Gateway::Parts::Stop() {
  switch (num_stops++) {
    case 0:
      return io_thread.Spawn(Drain(), [this] { io_thread.Stop(); });
    case 1:
      return io_thread.Spawn(End(), [] {});
    default:
      server->CloseAll();
  }
}

absl::Status Gateway::Parts::OpenAccessLog() {
  if (options.access_log_file.empty()) return absl::OkStatus();
  return access_log.Open(options.access_log_file);
}

void Gateway::Parts::Reload() {
  spdlog::info("reading keys and certificates again");
  for (const absl::Status& status : {api_keys.Load(), OpenAccessLog(), server->ReloadTls()}) {
    if (!status.ok()) spdlog::error("nothing changes: {}", std::string(status.message()));
  }
}

void Gateway::HandleSignals() {
  Parts* const parts = parts_.get();
  parts->io_thread.HandleSignals([parts] { parts->Stop(); }, [parts] { parts->Reload(); });
}

void Gateway::Reload() {
  parts_->io_thread.Post([parts = parts_.get()] { parts->Reload(); });
}

void Gateway::Stop() {
  parts_->io_thread.Post([parts = parts_.get()] { parts->Stop(); });
}

}  // namespace fathom
