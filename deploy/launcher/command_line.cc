#include "deploy/launcher/command_line.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "deploy/launcher/gateway_flags.h"
#include "deploy/launcher/vllm_flags.h"

namespace fathom {
namespace {

using Validator = std::function<std::string(const std::string&)>;

// One of `values`, or the reason why a value that others know is not among them.
Validator OneOf(std::vector<std::string> values,
                std::vector<std::pair<std::string, std::string>> refused = {}) {
  return [values = std::move(values), refused = std::move(refused)](const std::string& value) {
    if (absl::c_linear_search(values, value)) return std::string();
    for (const auto& [name, reason] : refused) {
      if (name == value) return absl::StrCat("'", value, "' is refused: ", reason);
    }
    return absl::StrCat("'", value, "' is not one of ", absl::StrJoin(values, ", "));
  };
}

// Reads a count within [low, high] into *target. (The library's own conversions know no suffixes.)
Validator CountInto(int64_t* target, int64_t low, int64_t high) {
  return [=](const std::string& value) -> std::string {
    const absl::StatusOr<int64_t> count = ParseCount(value);
    if (!count.ok()) return std::string(count.status().message());
    if (*count < low) return absl::StrCat(value, " is too small: expected at least ", low);
    if (*count > high) return absl::StrCat(value, " is too large: expected at most ", high);
    *target = *count;
    return std::string();
  };
}

Validator Between(int64_t low, int64_t high) {
  return [=](const std::string& value) -> std::string {
    int64_t number = 0;
    if (absl::SimpleAtoi(value, &number) && number >= low && number <= high) return std::string();
    const bool is_number = absl::SimpleAtoi(value, &number);
    return absl::StrCat("'", value, "' is ", is_number ? "out of range" : "no whole number",
                        ": expected ", low, " to ", high);
  };
}

// Before parsing, so that no message repeats what stands behind such a flag: it may be a secret.
absl::Status RefuseForeignFlags(const std::vector<std::string>& arguments) {
  for (const std::string& argument : arguments) {
    const std::string name = argument.substr(0, argument.find('='));
    if (const std::optional<std::string> reason = ReasonToRefuse(name)) {
      return absl::InvalidArgumentError(absl::StrCat(name, " is refused: ", *reason));
    }
  }
  return absl::OkStatus();
}

void AddNeedlessFlags(CLI::App& app) {
  for (const NeedlessFlag& flag : NeedlessFlags()) {
    const bool is_switch = *flag.values == '\0';
    CLI::Option* option = is_switch ? app.add_flag(flag.name) : app.add_option(flag.name);
    option->group("");  // not in --help
  }
}

absl::Status NoteNeedlessFlags(const CLI::App& app, std::vector<std::string>& notes) {
  for (const NeedlessFlag& flag : NeedlessFlags()) {
    const CLI::Option* option = app.get_option(flag.name);
    if (option->count() == 0) continue;
    std::string given = flag.name;
    if (*flag.values != '\0') {
      const std::string& value = option->results().front();
      absl::StrAppend(&given, " ", value);
      const std::vector<std::string> harmless = absl::StrSplit(flag.values, '|');
      if (!absl::c_linear_search(harmless, value)) {
        return absl::InvalidArgumentError(absl::StrCat(given, " is refused: ", flag.reason));
      }
    }
    notes.push_back(absl::StrCat(given, " changes nothing: ", flag.reason));
  }
  return absl::OkStatus();
}

void AddModelFlags(CLI::App& app, ServeOptions& options) {
  app.add_option("MODEL_DIR", options.model_dir,
                 "Folder with config.json and *.safetensors, as on Hugging Face")
      ->required();
  app.add_option("--served-model-name", options.served_model_names,
                 "Names the API answers to, the first is reported [MODEL_DIR]")
      ->expected(1, -1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  app.add_option("--chat-encoding", options.chat_encoding,
                 "How chats become prompts: auto, by the model's files, or a name such as "
                 "deepseek_v31")
      ->capture_default_str()
      ->check(OneOf({"auto", "deepseek_v3", "deepseek_v3_0324", "deepseek_r1_first", "deepseek_r1",
                     "deepseek_r1_0528", "deepseek_v31", "deepseek_v32", "kimi_k2",
                     "kimi_k2_thinking"}));
  app.add_option("--device", options.device,
                 "Where workers compute: cpu, cuda; or sim: they only take their time")
      ->capture_default_str()
      ->check(OneOf({"cpu", "cuda", "sim"}));
  app.add_option("--sim-profile", options.sim_profile,
                 "With --device sim: JSON file that says how long steps take");
  const std::string no_float16 =
      "the numbers of these models leave the range of float16; use bfloat16 or float32";
  app.add_option("--dtype", options.dtype,
                 "Type of activations: auto, float32, bfloat16; auto is float32 on a CPU, "
                 "bfloat16 on a GPU")
      ->capture_default_str()
      ->check(OneOf({"auto", "float32", "float", "bfloat16"},
                    {{"half", no_float16}, {"float16", no_float16}}));
  app.add_option("--quantization,-q", options.quantization,
                 "none, or fp8: weights become FP8 in blocks of 128x128 while loading")
      ->capture_default_str()
      ->check(OneOf({"none", "fp8"}));
  app.add_option("--activation-quantization", options.activation_quantization,
                 "What FP8 weights are multiplied with: none, fp8 (rows in blocks of 128), auto; "
                 "auto is fp8 on a GPU, none on a CPU")
      ->capture_default_str()
      ->check(OneOf({"auto", "none", "fp8"}));
  const std::string only_safetensors = "checkpoints are read from safetensors only";
  app.add_option("--load-format", options.load_format,
                 "auto, safetensors: the checkpoint; dummy: random weights, for trying a machine")
      ->capture_default_str()
      ->check(OneOf({"auto", "safetensors", "dummy"},
                    {{"pt", only_safetensors}, {"npcache", only_safetensors}}));
  app.add_option("--tensor-parallel-size", options.tensor_parallel_size,
                 "Workers that share each layer; must divide heads, experts' width and vocabulary; "
                 "-tp for short")
      ->capture_default_str()
      ->check(Between(1, 1024));
  app.add_option("--data-parallel-size", options.data_parallel_size,
                 "Groups of workers, each with the whole model, that share the requests; "
                 "-dp for short")
      ->capture_default_str()
      ->check(Between(1, 1024));
  app.add_flag("--enable-expert-parallel", options.enable_expert_parallel,
               "Workers own whole experts instead of a slice of each");
  app.add_option("--threads", options.threads,
                 "Threads per worker [the host's cores divided by the workers]")
      ->check(Between(1, 1024));
  app.add_option("--gpus",
                 "With --device cuda: the GPU of each worker, e.g. 4,5,6,7; workers that share one "
                 "share its memory [0, 1, ...]")
      ->type_name("LIST")
      ->check([&options](const std::string& list) {
        options.gpus.clear();
        for (const absl::string_view text : absl::StrSplit(list, ',')) {
          int gpu = 0;
          if (!absl::SimpleAtoi(text, &gpu) || gpu < 0 || gpu > 1023) {
            return absl::StrCat("'", text, "' is no GPU: expected a list of numbers from 0 on");
          }
          options.gpus.push_back(gpu);
        }
        return std::string();
      });
  app.add_option("--collectives", options.collectives,
                 "How workers add up: peer (GPUs, through each other's memory), nccl, shm (shared "
                 "memory), gloo (TCP); auto is peer for GPUs, shm for CPUs")
      ->capture_default_str()
      ->check(OneOf({"auto", "peer", "nccl", "shm", "gloo"}));
  app.add_option("--seed", options.seed, "Seeds requests that bring no seed of their own")
      ->capture_default_str()
      ->check([](const std::string& text) {
        uint64_t seed = 0;  // the library would take -1 for 2^64 - 1
        return absl::SimpleAtoi(text, &seed)
                   ? ""
                   : absl::StrCat("'", text, "' is no seed: expected 0 to 2^64 - 1");
      });
}

void AddMemoryFlags(CLI::App& app, ServeOptions& options) {
  app.add_option("--max-model-len",
                 "Tokens of prompt and output together, e.g. 8192, 32k, 32K "
                 "[auto: the model's limit, or what fits]")
      ->type_name("COUNT")
      ->check([&options](const std::string& value) {
        options.max_model_len = 0;
        if (value == "auto" || value == "-1") return std::string();
        return CountInto(&options.max_model_len, 1, std::numeric_limits<int32_t>::max())(value);
      });
  app.add_option("--gpu-memory-utilization", options.gpu_memory_utilization,
                 "Share of the device's memory to use; on a CPU of the host's, by all workers")
      ->capture_default_str()
      ->check([](const std::string& text) {
        double value = 0;
        const bool sane = absl::SimpleAtod(text, &value) && value > 0 && value <= 1;
        return sane ? "" : absl::StrCat("'", text, "' is not a share: expected 0 < F <= 1");
      });
  app.add_option("--kv-cache-memory-bytes",
                 "KV cache of each worker, e.g. 512M, 4G [what the utilization leaves]")
      ->type_name("COUNT")
      ->check(CountInto(&options.kv_cache_memory_bytes, 1, int64_t{1} << 50));
  const std::string no_e5m2 = "the KV cache holds e4m3, which has more digits; use fp8";
  app.add_option(
         "--kv-cache-dtype", options.kv_cache_dtype,
         "auto (as --dtype), float32, bfloat16, fp8 (the latent in e4m3, the key in bfloat16)")
      ->capture_default_str()
      ->check(OneOf({"auto", "float32", "bfloat16", "fp8", "fp8_e4m3"}, {{"fp8_e5m2", no_e5m2}}));
  app.add_option("--block-size", options.block_size, "Tokens per KV block: 1, 16, 32, 64, 128")
      ->default_str(absl::StrCat(BlockSizeOf(options)))
      ->check(OneOf({"1", "16", "32", "64", "128"}));
  app.add_flag("--enable-prefix-caching,!--no-enable-prefix-caching", options.enable_prefix_caching,
               "Requests that begin alike share KV blocks [on]");
}

void AddSchedulingFlags(CLI::App& app, ServeOptions& options) {
  constexpr int64_t kMostAtOnce = 1 << 20;
  app.add_option("--max-num-seqs", "Sequences in one step")
      ->type_name("COUNT")
      ->default_str(absl::StrCat(options.max_num_seqs))
      ->check(CountInto(&options.max_num_seqs, 1, 65536));
  app.add_option("--max-num-batched-tokens", "Tokens in one step, e.g. 8k")
      ->type_name("COUNT")
      ->default_str(absl::StrCat(options.max_num_batched_tokens))
      ->check(CountInto(&options.max_num_batched_tokens, 1, kMostAtOnce));
  app.add_option("--max-queued-requests", "Requests that may wait; more are refused")
      ->type_name("COUNT")
      ->default_str(absl::StrCat(options.max_queued_requests))
      ->check(CountInto(&options.max_queued_requests, 1, kMostAtOnce));
  app.add_option("--max-queued-tokens",
                 "Tokens of prompts that may wait, unless one waits alone; 0: any number")
      ->type_name("COUNT")
      ->default_str(absl::StrCat(options.max_queued_tokens))
      ->check(CountInto(&options.max_queued_tokens, 0, int64_t{1} << 40));
  app.add_option("--scheduling-policy", options.scheduling_policy,
                 "Who comes first: fcfs (who came first), priority (whose `priority` is lower)")
      ->capture_default_str()
      ->check(OneOf({"fcfs", "priority"}));
  app.add_option("--target-itl-ms", options.target_itl_ms,
                 "Milliseconds between tokens of a stream: prompts are read in pieces so small "
                 "that steps take no longer; 0: any time")
      ->capture_default_str()
      ->check([](const std::string& text) {
        double value = -1;
        const bool sane = absl::SimpleAtod(text, &value) && value >= 0 && value <= 60000;
        return sane ? "" : absl::StrCat("'", text, "' is not a time: expected 0 to 60000");
      });
  app.add_option("--step-timeout-seconds", options.step_timeout_seconds,
                 "A worker silent for so long in a step is lost")
      ->capture_default_str()
      ->check(Between(1, 86400));
  app.add_option("--join-timeout-seconds", options.join_timeout_seconds,
                 "Time for workers to connect to each other, after loading")
      ->capture_default_str()
      ->check(Between(1, 86400));
  app.add_option("--drain-timeout,--drain-timeout-seconds", options.drain_timeout_seconds,
                 "Seconds that running requests get to finish after SIGTERM")
      ->capture_default_str()
      ->check(Between(1, 86400));
  app.add_option("--recovery-timeout-seconds", options.recovery_timeout_seconds,
                 "Seconds that requests wait for lost workers to come back; 0: not at all")
      ->capture_default_str()
      ->check(Between(0, 86400));
}

void AddServerFlags(CLI::App& app, ServeOptions& options) {
  app.add_option("--host", options.host, "Address the HTTP server listens on")
      ->capture_default_str();
  app.add_option("--port", options.port, "Its port; 0: any free one")
      ->capture_default_str()
      ->check(Between(0, 65535));
  app.add_option("--grpc-listen", options.grpc_listen,
                 "Let gRPC clients in at unix:/path or host:port [not]");
  app.add_flag("--grpc-reflection", options.grpc_reflection, "Tell gRPC clients which calls exist");
  app.add_option("--tls-certificate", options.tls_certificate,
                 "PEM file, for --grpc-listen on a network");
  app.add_option("--tls-private-key", options.tls_private_key, "PEM file");
  app.add_option("--tls-authority", options.tls_authority, "PEM file: who signs the clients");
  app.add_flag("--insecure", options.insecure, "Allow --grpc-listen on a network without TLS");
  app.add_option("--log-level", options.log_level, "debug, info, warn, error")
      ->capture_default_str()
      ->check(OneOf({"debug", "info", "warn", "error"}));
  app.add_option("--run-directory", options.run_directory,
                 "For the sockets [a private one in XDG_RUNTIME_DIR or /tmp]");
  app.add_option("--ready-file", options.ready_file,
                 "Written when ready; holds the URL, is removed at the end");
}

// Rewrites what vLLM's parser accepts and ours would not: -tp, -q=…, and underscores for dashes.
std::vector<std::string> Normalized(const std::vector<std::string>& arguments) {
  std::vector<std::string> normalized;
  for (std::string argument : arguments) {
    const size_t end = std::min(argument.find('='), argument.size());
    std::string name = argument.substr(0, end);
    if (name == "-tp") name = "--tensor-parallel-size";
    if (name == "-dp") name = "--data-parallel-size";
    if (name == "-pp") name = "--pipeline-parallel-size";
    if (name == "-ep") name = "--enable-expert-parallel";
    if (name == "-q") name = "--quantization";
    if (absl::StartsWith(name, "--")) std::replace(name.begin(), name.end(), '_', '-');
    normalized.push_back(name + argument.substr(end));
  }
  return normalized;
}

// What no single flag can know.
absl::Status CheckTogether(const ServeOptions& options) {
  const auto num_gpus = static_cast<int>(options.gpus.size());
  if (NumWorkers(options) > 1024) {
    return absl::InvalidArgumentError(
        absl::StrCat("--tensor-parallel-size times --data-parallel-size are ", NumWorkers(options),
                     " workers: expected at most 1024"));
  }
  if (num_gpus != 0 && num_gpus != NumWorkers(options)) {
    return absl::InvalidArgumentError(absl::StrCat("--gpus names ", num_gpus,
                                                   " GPUs: expected one for each of the ",
                                                   NumWorkers(options), " workers"));
  }
  const bool wants_gpus = options.collectives == "peer" || options.collectives == "nccl";
  if (options.device != "cuda" && (num_gpus != 0 || wants_gpus)) {
    return absl::InvalidArgumentError(
        absl::StrCat(wants_gpus ? "--collectives " + options.collectives : "--gpus",
                     " is for --device cuda, not ", options.device));
  }
  if ((options.device == "sim") == options.sim_profile.empty()) {
    return absl::InvalidArgumentError(
        "--device sim and --sim-profile go together: give both or none");
  }
  const int tls_files = !options.tls_certificate.empty() + !options.tls_private_key.empty() +
                        !options.tls_authority.empty();
  if (tls_files != 0 && tls_files != 3) {
    return absl::InvalidArgumentError(
        "--tls-certificate, --tls-private-key and --tls-authority go together: give all or none");
  }
  if (options.grpc_listen.empty() && (tls_files != 0 || options.insecure)) {
    return absl::InvalidArgumentError(
        "--tls-… and --insecure are about --grpc-listen, which is not given");
  }
  return absl::OkStatus();
}

// How many letters to change, add or drop to get from one word to the other.
size_t EditDistance(const std::string& from, const std::string& to) {
  std::vector<size_t> row(to.size() + 1);
  std::iota(row.begin(), row.end(), 0);
  for (size_t i = 1; i <= from.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i);
    for (size_t j = 1; j <= to.size(); ++j) {
      const size_t replaced = diagonal + (from[i - 1] == to[j - 1] ? 0 : 1);
      diagonal = std::exchange(row[j], std::min({replaced, row[j] + 1, row[j - 1] + 1}));
    }
  }
  return row.back();
}

// "unknown flag --prot: did you mean --port?"
std::string DescribeUnknown(const CLI::App& command, const std::string& argument) {
  if (!absl::StartsWith(argument, "-")) {
    const bool is_command = command.get_parent() == nullptr;
    return absl::StrCat("'", argument, "' is ",
                        is_command ? "no command: expected serve, check or version"
                                   : "one argument too many: expected MODEL_DIR and flags");
  }
  const std::string flag = argument.substr(0, argument.find('='));
  std::string nearest;
  size_t smallest = flag.size() / 3 + 1;
  for (const CLI::Option* option : command.get_options()) {
    const size_t distance = EditDistance(flag, option->get_name());
    if (distance >= smallest) continue;
    smallest = distance;
    nearest = option->get_name();
  }
  return absl::StrCat("unknown flag ", flag,
                      nearest.empty() ? "" : absl::StrCat(": did you mean ", nearest, "?"));
}

// The one place where the library's exceptions end.
absl::Status Parse(CLI::App& app, std::vector<std::string> arguments, CommandLine& result) {
  std::reverse(arguments.begin(), arguments.end());  // as CLI11 wants them
  std::string what;
  try {
    app.parse(std::move(arguments));
    return absl::OkStatus();
  } catch (const CLI::CallForHelp&) {
    result.text = app.help();
    return absl::OkStatus();
  } catch (const CLI::CallForVersion& version) {
    result.text = absl::StrCat(version.what(), "\n");
    return absl::OkStatus();
  } catch (const CLI::ParseError& error) {
    what = error.what();
  }
  const std::vector<CLI::App*> commands = app.get_subcommands();
  const CLI::App& command = commands.empty() ? app : *commands.front();
  const std::vector<std::string> unknown = app.remaining(/*recurse=*/true);
  if (!unknown.empty()) what = DescribeUnknown(command, unknown.front());
  return absl::InvalidArgumentError(absl::StrCat(
      what, " (fathom ", commands.empty() ? "" : command.get_name() + " ", "--help lists all)"));
}

}  // namespace

absl::StatusOr<int64_t> ParseCount(absl::string_view text) {
  constexpr absl::string_view kSuffixes = "kmgt";
  absl::string_view digits = text;
  double unit = 1;
  if (!text.empty()) {
    const char suffix = text.back();
    const size_t power = kSuffixes.find(absl::ascii_tolower(suffix));
    if (power != absl::string_view::npos) {
      unit = std::pow(absl::ascii_islower(suffix) ? 1000.0 : 1024.0, power + 1);
      digits.remove_suffix(1);
    }
  }
  const bool plain = !digits.empty() && absl::ascii_isdigit(digits.front()) &&
                     digits.find_first_not_of("0123456789.") == absl::string_view::npos;
  double number = 0;
  if (!plain || !absl::SimpleAtod(digits, &number)) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is not a count: expected a number such as 4096, 32k or 4G"));
  }
  number *= unit;
  if (number != std::floor(number)) {
    return absl::InvalidArgumentError(absl::StrCat("'", text, "' is not a whole number"));
  }
  if (number > 9e15) return absl::InvalidArgumentError(absl::StrCat("'", text, "' is too large"));
  return static_cast<int64_t>(number);
}

absl::StatusOr<CommandLine> ParseCommandLine(const std::vector<std::string>& arguments,
                                             absl::string_view version) {
  CommandLine result;
  CLI::App app("Fathom serves models of the DeepSeek-V3 family over the OpenAI API.", "fathom");
  app.get_formatter()->column_width(36);
  app.set_version_flag("--version", absl::StrCat("fathom ", version));
  app.require_subcommand(1);
  const auto add_command = [&](const char* name, const char* description) {
    CLI::App* command = app.add_subcommand(name, description);
    command->option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
    AddModelFlags(*command, result.serve);
    AddMemoryFlags(*command, result.serve);
    AddSchedulingFlags(*command, result.serve);
    AddServerFlags(*command, result.serve);
    AddGatewayFlags(*command, result.serve);
    AddNeedlessFlags(*command);
    return command;
  };
  CLI::App* serve = add_command("serve", "Start coordinator, workers and gateway, and keep them");
  CLI::App* check =
      add_command("check", "Say whether serve would start, and print the memory plan");
  const CLI::App* version_command = app.add_subcommand("version", "Print the version");

  if (arguments.empty()) {
    result.text = app.help();
    return result;
  }
  const std::vector<std::string> normalized = Normalized(arguments);
  RETURN_IF_ERROR(RefuseForeignFlags(normalized));
  RETURN_IF_ERROR(Parse(app, normalized, result));
  if (version_command->parsed()) result.text = absl::StrCat("fathom ", version, "\n");
  if (!result.text.empty()) return result;

  const CLI::App* chosen = serve->parsed() ? serve : check;
  result.command = chosen == serve ? Command::kServe : Command::kCheck;
  RETURN_IF_ERROR(NoteNeedlessFlags(*chosen, result.notes));
  if (result.serve.dtype == "float") result.serve.dtype = "float32";
  if (result.serve.kv_cache_dtype == "fp8_e4m3") result.serve.kv_cache_dtype = "fp8";
  if (result.serve.load_format == "safetensors") result.serve.load_format = "auto";
  if (result.serve.host == "localhost") result.serve.host = "127.0.0.1";
  RETURN_IF_ERROR(CheckTogether(result.serve));
  return result;
}

}  // namespace fathom
