// The gateway as one object: everything between the listening socket and the coordinator.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "gateway/api_keys.h"
#include "gateway/http/server.h"
#include "gateway/openai/api_limits.h"
#include "gateway/openai/served_model.h"
#include "gateway/rpc/coordinator_client.h"

namespace fathom {

struct GatewayOptions {
  std::string model_dir;  // tokenizer.json, tokenizer_config.json, generation_config.json
  std::string chat_encoding = "auto";  // or one of ChatEncoder::Names
  CoordinatorClientOptions coordinator;
  ServedModelOptions model;
  ServerOptions server;
  ApiKeyOptions api_keys;
  std::string access_log_file;  // empty: none
  ApiLimits limits;
  int text_threads = 2;
  std::chrono::milliseconds drain_timeout{30'000};  // for running requests, after Stop
  std::string version;
};

class Gateway {
 public:
  // Reads the model's text files and listens. FailedPrecondition: a file of the model cannot be
  // used; InvalidArgument, NotFound: an option cannot (an address, a TLS file); AlreadyExists: the
  // port is in use.
  static absl::StatusOr<std::unique_ptr<Gateway>> Create(GatewayOptions options);
  ~Gateway();

  uint16_t port() const;

  // Serves on the calling thread, which becomes the I/O thread, until stopped.
  void Run();

  // SIGTERM and SIGINT call Stop, SIGHUP calls Reload.
  void HandleSignals();

  // Reads keys, certificate and private key again, and opens the access log anew; what cannot be
  // used is logged and changes nothing. Thread-safe.
  void Reload();

  // Takes no more work, lets running requests finish until the drain timeout, ends the others with
  // an error, then Run returns. Until then drain_guard.h says what is still answered. The second
  // call ends them at once; the third closes everything. Thread-safe.
  void Stop();

 private:
  struct Parts;
  explicit Gateway(std::unique_ptr<Parts> parts);

  const std::unique_ptr<Parts> parts_;
};

}  // namespace fathom
