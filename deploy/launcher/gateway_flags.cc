#include "deploy/launcher/gateway_flags.h"

#include <CLI/CLI.hpp>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "deploy/launcher/command_line.h"

namespace fathom {
namespace {

// A limit of the HTTP server, passed on to it. Defaults and bounds are the gateway's own, told here
// for --help and so that a bad value is refused before anything starts.
struct GatewayLimit {
  const char* name;
  const char* default_value;
  double low;
  double high;
  const char* description;
};

constexpr GatewayLimit kGatewayLimits[] = {
    {"--max-connections", "20000", 1, 1e6,
     "Connections at a time; a further one replaces who waits longest, or gets a 503"},
    {"--max-header-bytes", "16384", 1024, 1 << 20, "Bytes of a request's line and headers"},
    {"--max-header-fields", "100", 8, 10'000, "Header fields of a request"},
    {"--max-uri-bytes", "2048", 64, 1 << 16, "Bytes of a request's URI"},
    {"--max-body-bytes", "8388608", 1024, 1 << 30, "Bytes of a request's body"},
    {"--header-timeout-seconds", "10", 0.01, 1e6, "For a request's headers to arrive"},
    {"--body-timeout-seconds", "30", 0.01, 1e6, "For a request's body to arrive"},
    {"--keep-alive-timeout-seconds", "60", 0.01, 1e6, "Between the requests of a connection"},
    {"--write-timeout-seconds", "30", 0.01, 1e6, "For a client that reads nothing"},
    {"--max-json-depth", "64", 4, 1024, "Nesting of a request's JSON"},
    {"--max-messages", "2048", 1, 1e6, "Messages of a chat"},
    {"--max-n", "128", 1, 10'000, "Largest n of a request"},
    {"--max-prompts", "128", 1, 1e6, "Prompts of a request"},
    {"--max-choices", "256", 1, 1e6, "Prompts times n of a request"},
    {"--max-stop-strings", "16", 1, 1e6, "Stop strings of a request"},
    {"--max-stop-string-bytes", "1024", 1, 1e6, "Bytes of a stop string"},
    {"--max-logprobs", "20", 0, 20, "Most logprobs, top_logprobs and prompt_logprobs"},
    {"--text-threads", "2", 1, 64, "Threads that tokenize prompts; one more is for long ones"},
};

void AddGatewayLimits(CLI::App& app, ServeOptions& options) {
  for (const GatewayLimit& limit : kGatewayLimits) {
    const auto pass_on = [&options, &limit](const std::string& text) -> std::string {
      double value = 0;
      const bool is_count = limit.low == std::floor(limit.low);  // the others are seconds
      if (is_count) {
        const absl::StatusOr<int64_t> count = ParseCount(text);
        if (!count.ok()) return std::string(count.status().message());
        value = static_cast<double>(*count);
      } else if (!absl::SimpleAtod(text, &value)) {
        return absl::StrCat("'", text, "' is no number of seconds");
      }
      if (!(value >= limit.low && value <= limit.high)) {
        return absl::StrCat("'", text, "' is out of range: expected ", limit.low, " to ",
                            static_cast<int64_t>(limit.high));
      }
      std::vector<std::string>& flags = options.gateway_flags;
      const auto earlier = absl::c_find(flags, limit.name);  // given twice: the last one counts
      if (earlier != flags.end()) flags.erase(earlier, earlier + 2);
      flags.insert(flags.end(),
                   {limit.name, is_count ? absl::StrCat(static_cast<int64_t>(value)) : text});
      return std::string();
    };
    app.add_option(limit.name, limit.description)
        ->group("Limits of the HTTP server")
        ->type_name("NUMBER")
        ->default_str(limit.default_value)
        ->check(pass_on);
  }
}

// What the gateway is told of keys, certificate and access log. Its own check tries them.
void AddAccessFlags(CLI::App& app, ServeOptions& options) {
  struct AccessFlag {
    const char* name;
    const char* type_name;
    const char* description;
    bool is_file;
  };
  constexpr AccessFlag kFlags[] = {
      {"--api-key", "KEY",
       "Asked of every request but probes; several may be given; also from VLLM_API_KEY", false},
      {"--api-key-file", "FILE",
       "Lines of a key's SHA-256 and a name for the log; read again at SIGHUP", true},
      {"--ssl-certfile", "FILE", "PEM: HTTPS with this certificate; read again at SIGHUP", true},
      {"--ssl-keyfile", "FILE", "PEM: its private key", true},
      {"--access-log-file", "FILE", "One JSON line a request is appended; opened anew at SIGHUP",
       true},
  };
  for (const AccessFlag& flag : kFlags) {
    const auto pass_on = [&options, flag](const std::vector<std::string>& values) {
      for (const std::string& value : values) {
        options.gateway_flags.insert(options.gateway_flags.end(), {flag.name, value});
      }
      options.gateway_reloads |= flag.is_file;
      options.https |= flag.name == absl::string_view("--ssl-certfile");
      options.has_keys |= absl::StartsWith(flag.name, "--api-key");
    };
    CLI::Option* option =
        app.add_option_function<std::vector<std::string>>(flag.name, pass_on, flag.description);
    option->group("Access")->type_name(flag.type_name);
    if (flag.is_file) {
      option->expected(1);
    } else {
      option->expected(1, -1)->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
    }
  }
  app.get_option("--ssl-certfile")->needs("--ssl-keyfile");
  app.get_option("--ssl-keyfile")->needs("--ssl-certfile");
}

// Which web pages may ask. The gateway reads the lists, in its own check.
void AddCrossOriginFlags(CLI::App& app, ServeOptions& options) {
  constexpr std::pair<const char*, const char*> kLists[] = {
      {"--allowed-origins", "JSON list of origins whose web pages may ask [none]"},
      {"--allowed-methods", "JSON list of the methods they may use [all]"},
      {"--allowed-headers", "JSON list of the headers they may send [all]"},
  };
  for (const auto& [name, description] : kLists) {
    const auto pass_on = [&options, name = name](const std::string& json) {
      options.gateway_flags.insert(options.gateway_flags.end(), {name, json});
    };
    app.add_option_function<std::string>(name, pass_on, description)
        ->group("Access")
        ->type_name("JSON");
  }
  const auto pass_on = [&options](int64_t) {
    options.gateway_flags.emplace_back("--allow-credentials");
  };
  app.add_flag_function("--allow-credentials", pass_on,
                        "They may use credentials that the browser holds")
      ->group("Access");
}

}  // namespace

void AddGatewayFlags(CLI::App& app, ServeOptions& options) {
  AddAccessFlags(app, options);
  AddCrossOriginFlags(app, options);
  AddGatewayLimits(app, options);
}

}  // namespace fathom
