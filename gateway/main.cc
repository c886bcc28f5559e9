// fathom-gateway: OpenAI's API over HTTP, for one coordinator.
#include <sys/resource.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/flag_parser.h"
#include "base/status_macros.h"
#include "gateway/gateway.h"
#include "gateway/openai/json_fields.h"
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
  // JSON lists, as with vLLM.
  std::string allowed_origins = "[]", allowed_methods = "[\"*\"]", allowed_headers = "[\"*\"]";
  std::string log_level = "info";
  bool check = false;
};

void AddNumber(FlagParser& parser, const std::string& name, size_t& value, size_t low, size_t high,
               const std::string& help) {
  parser.Add(name, value, help).Between(low, high).ShowDefault();
}

void AddSeconds(FlagParser& parser, const std::string& name, std::chrono::milliseconds& value,
                const std::string& help) {
  parser.AddSeconds(name, value, help).Between(0.01, 1e6);
}

void AddServerFlags(FlagParser& parser, ServerOptions& server) {
  parser.Add("--host", server.host, "Address to listen on").ShowDefault();
  parser.Add("--port", server.port, "Port to listen on; 0: any free one").ShowDefault();
  constexpr size_t kMany = 1'000'000;
  AddNumber(parser, "--max-connections", server.max_connections, 1, kMany,
            "Connections at a time; a further one replaces who waits longest, or gets a 503");
  RequestLimits& limits = server.request_limits;
  AddNumber(parser, "--max-header-bytes", limits.head_bytes, 1'024, 1 << 20,
            "Bytes of a request's line and headers");
  AddNumber(parser, "--max-header-fields", limits.fields, 8, 10'000, "Header fields of a request");
  AddNumber(parser, "--max-uri-bytes", limits.target_bytes, 64, 1 << 16,
            "Bytes of a request's URI");
  AddNumber(parser, "--max-body-bytes", limits.body_bytes, 1'024, size_t{1} << 30,
            "Bytes of a request's body");
  AddSeconds(parser, "--header-timeout-seconds", server.head_timeout,
             "For a request's headers to arrive");
  AddSeconds(parser, "--body-timeout-seconds", server.body_timeout,
             "For a request's body to arrive");
  AddSeconds(parser, "--keep-alive-timeout-seconds", server.keep_alive_timeout,
             "Between the requests of a connection");
  AddSeconds(parser, "--write-timeout-seconds", server.write_timeout,
             "A client that reads nothing for that long is disconnected");
}

void AddApiFlags(FlagParser& parser, ApiLimits& limits) {
  constexpr size_t kMany = 1'000'000;
  const auto add = [&parser](const std::string& name, int64_t& value, int64_t high,
                             const std::string& help) {
    parser.Add(name, value, help).Between(int64_t{1}, high).ShowDefault();
  };
  AddNumber(parser, "--max-json-depth", limits.json_depth, 4, 1'024, "Nesting of a request's JSON");
  AddNumber(parser, "--max-messages", limits.messages, 1, kMany, "Messages of a chat");
  add("--max-n", limits.n, 10'000, "Largest n of a request");
  AddNumber(parser, "--max-prompts", limits.prompts, 1, kMany, "Prompts of a request");
  AddNumber(parser, "--max-choices", limits.choices, 1, kMany, "Prompts times n of a request");
  AddNumber(parser, "--max-stop-strings", limits.stop_strings, 1, kMany,
            "Stop strings of a request");
  AddNumber(parser, "--max-stop-string-bytes", limits.stop_string_bytes, 1, kMany,
            "Bytes of a stop string");
  // The coordinator's limit is 20: a flag could only make it smaller.
  parser.Add("--max-logprobs", limits.logprobs, "Most logprobs, top_logprobs, prompt_logprobs")
      .Between(0, 20)
      .ShowDefault();
}

void AddCoordinatorFlags(FlagParser& parser, CoordinatorClientOptions& coordinator) {
  parser.Add("--coordinator", coordinator.address, "The coordinator: unix:/path or host:port")
      .Required();
  TlsOptions& tls = coordinator.tls;
  parser.Add("--tls-certificate", tls.certificate_file, "PEM, for the coordinator to see");
  parser.Add("--tls-private-key", tls.private_key_file, "PEM");
  parser.Add("--tls-authority", tls.authority_file, "PEM, who signed the coordinator's");
  parser.AddSwitch("--insecure", tls.allow_insecure_tcp,
                   "Speak to a coordinator on another host without TLS");
}

void AddAccessFlags(FlagParser& parser, Flags& flags) {
  GatewayOptions& gateway = flags.gateway;
  parser
      .Add("--api-key", gateway.api_keys.keys,
           "Keys that may ask; also from VLLM_API_KEY. Without any, everybody may")
      .FromEnvironment("VLLM_API_KEY")
      .NotEmpty();
  parser.Add("--api-key-file", gateway.api_keys.file,
             "Lines of a key's SHA-256 and a name for the log; read again at SIGHUP");
  HttpsOptions& https = gateway.server.https;
  Flag certificate = parser.Add("--ssl-certfile", https.certificate_file,
                                "PEM: HTTPS with this certificate; read again at SIGHUP");
  Flag key = parser.Add("--ssl-keyfile", https.private_key_file, "PEM: its private key");
  certificate.Needs(key);
  key.Needs(certificate);
  parser.Add("--allowed-origins", flags.allowed_origins,
             "JSON list of the origins whose web pages may ask, e.g. [\"https://app.example\"], or "
             "[\"*\"]; none unless given");
  parser.Add("--allowed-methods", flags.allowed_methods, "JSON list of the methods they may use")
      .ShowDefault();
  parser.Add("--allowed-headers", flags.allowed_headers, "JSON list of the headers they may send")
      .ShowDefault();
  parser.AddSwitch("--allow-credentials", gateway.server.cross_origin.credentials,
                   "They may use credentials that the browser holds");
  parser.Add("--access-log-file", gateway.access_log_file,
             "One JSON line a request is appended to it; opened anew at SIGHUP");
}

void AddFlags(FlagParser& parser, Flags& flags) {
  GatewayOptions& gateway = flags.gateway;
  AddCoordinatorFlags(parser, gateway.coordinator);
  parser.Add("--model", gateway.model_dir, "Model folder: tokenizer and generation config")
      .Required()
      .ExistingDirectory();
  parser
      .Add("--served-model-name", gateway.model.names,
           "Names that requests may call the model by; the first is the one reported "
           "(default: the model folder as given)")
      .NotEmpty();
  std::vector<std::string> encodings = ChatEncoder::Names();
  encodings.insert(encodings.begin(), kAutoChatEncoding);
  parser
      .Add("--chat-encoding", gateway.chat_encoding,
           "How chats become prompts; auto: as the model's files say")
      .OneOf(encodings)
      .ShowDefault();
  AddServerFlags(parser, gateway.server);
  AddAccessFlags(parser, flags);
  AddApiFlags(parser, gateway.limits);
  parser
      .Add("--text-threads", gateway.text_threads,
           "Threads that tokenize prompts; one more is for long ones")
      .Between(1, 64)
      .ShowDefault();
  AddSeconds(parser, "--drain-timeout-seconds", gateway.drain_timeout,
             "For running requests after SIGTERM, as the coordinator's; the gateway gives it 2 s "
             "more to end them");
  parser.Add("--log-level", flags.log_level, "debug, info, warn or error")
      .OneOf({"debug", "info", "warn", "error"})
      .ShowDefault();
  parser.AddSwitch("--check", flags.check,
                   "Try flags, files and addresses, the coordinator's for its form only; exit");
  parser.AddVersion(FATHOM_VERSION);
}

absl::StatusOr<std::vector<std::string>> StringsOf(const std::string& flag, const std::string& json,
                                                   const std::string& example) {
  const absl::Status wrong = absl::InvalidArgumentError(absl::StrCat(
      flag, " is '", json, "', expected a JSON list of strings such as '", example, "'"));
  const absl::StatusOr<JsonDocument> document = JsonDocument::Parse(json, /*max_depth=*/4);
  simdjson::dom::array list;
  if (!document.ok() || document->root().get(list)) return wrong;
  std::vector<std::string> strings;
  for (const simdjson::dom::element element : list) {
    std::string_view text;
    if (element.get(text)) return wrong;
    strings.emplace_back(text);
  }
  return strings;
}

absl::Status ReadCrossOrigin(const Flags& flags, CrossOriginOptions& options) {
  ASSIGN_OR_RETURN(options.origins, StringsOf("--allowed-origins", flags.allowed_origins,
                                              R"(["https://app.example"])"));
  ASSIGN_OR_RETURN(options.methods,
                   StringsOf("--allowed-methods", flags.allowed_methods, R"(["GET", "POST"])"));
  ASSIGN_OR_RETURN(options.headers,
                   StringsOf("--allowed-headers", flags.allowed_headers, R"(["Authorization"])"));
  return CrossOriginPolicy::Check(options);
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
  FlagParser parser("OpenAI-compatible HTTP server for a Fathom coordinator", "fathom-gateway");
  Flags flags;
  AddFlags(parser, flags);
  if (const std::optional<int> code = parser.Parse(argc, argv)) return *code;
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

  const absl::Status cross_origin = ReadCrossOrigin(flags, options.server.cross_origin);
  if (!cross_origin.ok()) {
    spdlog::error("{}", std::string(cross_origin.message()));
    return kExitUsage;
  }
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
