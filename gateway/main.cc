// fathom-gateway: OpenAI's API over HTTP, for one coordinator.
#include <sys/resource.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "gateway/gateway.h"
#include "gateway/openai/model_text.h"
#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"

namespace fathom {
namespace {

constexpr int kExitUsage = 64;   // EX_USAGE
constexpr int kExitConfig = 78;  // EX_CONFIG

// What ends at the drain timeout ends with the coordinator's own words, if they come in time.
constexpr std::chrono::seconds kCoordinatorLead{2};

struct Flags {
  GatewayOptions gateway;
  std::string log_level = "info";
  bool check = false;
};

void AddNumber(CLI::App& app, const std::string& name, size_t& value, size_t low, size_t high,
               const std::string& help) {
  app.add_option(name, value, help)->check(CLI::Range(low, high))->capture_default_str();
}

void AddSeconds(CLI::App& app, const std::string& name, std::chrono::milliseconds& value,
                const std::string& help) {
  const auto set = [&value](const double& seconds) {
    value = std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000));
  };
  app.add_option_function<double>(name, set, help)
      ->check(CLI::Range(0.01, 1e6))
      ->default_str(std::to_string(value.count() / 1000));
}

// For CLI11: what is wrong, or "".
std::string CheckNotEmpty(const std::string& value) {
  return value.empty() ? "must not be empty" : "";
}

void AddServerFlags(CLI::App& app, ServerOptions& server) {
  app.add_option("--host", server.host, "Address to listen on")->capture_default_str();
  app.add_option("--port", server.port, "Port to listen on; 0: any free one")
      ->capture_default_str();
  constexpr size_t kMany = 1'000'000;
  AddNumber(app, "--max-connections", server.max_connections, 1, kMany,
            "Connections at a time; a further one replaces who waits longest, or gets a 503");
  RequestLimits& limits = server.request_limits;
  AddNumber(app, "--max-header-bytes", limits.head_bytes, 1'024, 1 << 20,
            "Bytes of a request's line and headers");
  AddNumber(app, "--max-header-fields", limits.fields, 8, 10'000, "Header fields of a request");
  AddNumber(app, "--max-uri-bytes", limits.target_bytes, 64, 1 << 16, "Bytes of a request's URI");
  AddNumber(app, "--max-body-bytes", limits.body_bytes, 1'024, size_t{1} << 30,
            "Bytes of a request's body");
  AddSeconds(app, "--header-timeout-seconds", server.head_timeout,
             "For a request's headers to arrive");
  AddSeconds(app, "--body-timeout-seconds", server.body_timeout, "For a request's body to arrive");
  AddSeconds(app, "--keep-alive-timeout-seconds", server.keep_alive_timeout,
             "Between the requests of a connection");
  AddSeconds(app, "--write-timeout-seconds", server.write_timeout,
             "A client that reads nothing for that long is disconnected");
}

void AddApiFlags(CLI::App& app, ApiLimits& limits) {
  constexpr size_t kMany = 1'000'000;
  const auto add = [&app](const std::string& name, int64_t& value, int64_t high,
                          const std::string& help) {
    app.add_option(name, value, help)->check(CLI::Range(int64_t{1}, high))->capture_default_str();
  };
  AddNumber(app, "--max-json-depth", limits.json_depth, 4, 1'024, "Nesting of a request's JSON");
  AddNumber(app, "--max-messages", limits.messages, 1, kMany, "Messages of a chat");
  add("--max-n", limits.n, 10'000, "Largest n of a request");
  AddNumber(app, "--max-prompts", limits.prompts, 1, kMany, "Prompts of a request");
  AddNumber(app, "--max-choices", limits.choices, 1, kMany, "Prompts times n of a request");
  AddNumber(app, "--max-stop-strings", limits.stop_strings, 1, kMany, "Stop strings of a request");
  AddNumber(app, "--max-stop-string-bytes", limits.stop_string_bytes, 1, kMany,
            "Bytes of a stop string");
  // The coordinator's limit is 20: a flag could only make it smaller.
  app.add_option("--max-logprobs", limits.logprobs, "Most logprobs, top_logprobs, prompt_logprobs")
      ->check(CLI::Range(0, 20))
      ->capture_default_str();
}

void AddCoordinatorFlags(CLI::App& app, CoordinatorClientOptions& coordinator) {
  app.add_option("--coordinator", coordinator.address, "The coordinator: unix:/path or host:port")
      ->required();
  TlsOptions& tls = coordinator.tls;
  app.add_option("--tls-certificate", tls.certificate_file, "PEM, for the coordinator to see");
  app.add_option("--tls-private-key", tls.private_key_file, "PEM");
  app.add_option("--tls-authority", tls.authority_file, "PEM, who signed the coordinator's");
  app.add_flag("--insecure", tls.allow_insecure_tcp,
               "Speak to a coordinator on another host without TLS");
}

void AddAccessFlags(CLI::App& app, GatewayOptions& gateway) {
  app.add_option("--api-key", gateway.api_keys.keys,
                 "Keys that may ask; also from VLLM_API_KEY. Without any, everybody may")
      ->envname("VLLM_API_KEY")
      ->check(CheckNotEmpty);
  app.add_option("--api-key-file", gateway.api_keys.file,
                 "Lines of a key's SHA-256 and a name for the log; read again at SIGHUP");
  HttpsOptions& https = gateway.server.https;
  CLI::Option* certificate =
      app.add_option("--ssl-certfile", https.certificate_file,
                     "PEM: HTTPS with this certificate; read again at SIGHUP");
  CLI::Option* key =
      app.add_option("--ssl-keyfile", https.private_key_file, "PEM: its private key");
  certificate->needs(key);
  key->needs(certificate);
  app.add_option("--access-log-file", gateway.access_log_file,
                 "One JSON line a request is appended to it; opened anew at SIGHUP");
}

void AddFlags(CLI::App& app, Flags& flags) {
  GatewayOptions& gateway = flags.gateway;
  AddCoordinatorFlags(app, gateway.coordinator);
  app.add_option("--model", gateway.model_dir, "Model folder: tokenizer and generation config")
      ->required()
      ->check(CLI::ExistingDirectory);
  app.add_option("--served-model-name", gateway.model.names,
                 "Names that requests may call the model by; the first is the one reported "
                 "(default: the model folder as given)")
      ->check(CheckNotEmpty);
  std::vector<std::string> encodings = ChatEncoder::Names();
  encodings.insert(encodings.begin(), kAutoChatEncoding);
  app.add_option("--chat-encoding", gateway.chat_encoding,
                 "How chats become prompts; auto: as the model's files say")
      ->check(CLI::IsMember(encodings))
      ->capture_default_str();
  AddServerFlags(app, gateway.server);
  AddAccessFlags(app, gateway);
  AddApiFlags(app, gateway.limits);
  app.add_option("--text-threads", gateway.text_threads, "Threads that tokenize prompts")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  AddSeconds(app, "--drain-timeout-seconds", gateway.drain_timeout,
             "For running requests after SIGTERM, as the coordinator's; the gateway gives it 2 s "
             "more to end them");
  app.add_option("--log-level", flags.log_level, "debug, info, warn or error")
      ->check(CLI::IsMember({"debug", "info", "warn", "error"}))
      ->capture_default_str();
  app.add_flag("--check", flags.check,
               "Try flags, files and addresses, the coordinator's for its form only; exit");
  app.set_version_flag("--version", FATHOM_VERSION);
}

bool IsLoopback(const std::string& host) {
  return host == "localhost" || host == "::1" || host.starts_with("127.");
}

// Works all the same: it is what users of other servers expect, and they may have a proxy.
void WarnOfOpenDoors(const GatewayOptions& options) {
  const ServerOptions& server = options.server;
  if (IsLoopback(server.host)) return;
  const bool has_keys = !options.api_keys.keys.empty() || !options.api_keys.file.empty();
  if (!has_keys) {
    spdlog::warn(
        "{} is open to everybody who can reach this host: set --api-key-file, or listen "
        "on 127.0.0.1",
        server.host);
  } else if (!server.https.enabled()) {
    spdlog::warn(
        "keys travel in the clear: set --ssl-certfile and --ssl-keyfile, or put a proxy "
        "with TLS before this");
  }
}

// Every connection is a file descriptor.
void RaiseFileLimit() {
  rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

int ExitCodeOf(const absl::Status& status) {
  if (absl::IsFailedPrecondition(status)) return kExitConfig;
  return absl::IsInvalidArgument(status) || absl::IsNotFound(status) ? kExitUsage : 1;
}

int Main(int argc, char** argv) {
  CLI::App app("OpenAI-compatible HTTP server for a Fathom coordinator", "fathom-gateway");
  Flags flags;
  AddFlags(app, flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {                   // CLI11 has no other way to say it
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    std::fprintf(stderr, "%s (see fathom-gateway --help)\n", error.what());
    return kExitUsage;
  }
  spdlog::set_default_logger(spdlog::stderr_logger_mt("gateway"));
  spdlog::set_pattern("%L %H:%M:%S.%e %v");
  spdlog::set_level(spdlog::level::from_str(flags.log_level));
  GatewayOptions& options = flags.gateway;
  if (options.model.names.empty()) options.model.names = {options.model_dir};
  options.model.root = options.model_dir;
  options.version = FATHOM_VERSION;
  options.drain_timeout += kCoordinatorLead;
  RaiseFileLimit();
  std::signal(SIGPIPE, SIG_IGN);

  WarnOfOpenDoors(options);
  const std::string host = options.server.host;
  const bool https = options.server.https.enabled();
  const std::string coordinator = options.coordinator.address;
  absl::StatusOr<std::unique_ptr<Gateway>> gateway = Gateway::Create(std::move(options));
  if (!gateway.ok()) {
    spdlog::error("{}", std::string(gateway.status().message()));
    return ExitCodeOf(gateway.status());
  }
  if (flags.check) return 0;
  (*gateway)->HandleSignals();
  spdlog::info("listening on {}://{}:{} for the coordinator at {}", https ? "https" : "http", host,
               (*gateway)->port(), coordinator);
  (*gateway)->Run();
  return 0;
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) { return fathom::Main(argc, argv); }
