// fathom-coordinator: serves fathom.v1.Generate with groups of workers.
#include <pthread.h>

#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <ctime>
#include <exception>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
#include "base/flag_parser.h"
#include "base/status_macros.h"
#include "coordinator/admission.h"
#include "coordinator/generate_service.h"
#include "coordinator/group_router.h"
#include "coordinator/metrics.h"
#include "google/protobuf/stubs/logging.h"
#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"

namespace fathom {
namespace {

constexpr int kExitUsage = 64;   // EX_USAGE
constexpr int kExitConfig = 78;  // EX_CONFIG

struct Flags {
  GenerateServer::Options server;
  StepLoop::Options loop;  // of each group, with the workers of all
  int data_parallel_size = 1;
  std::string collectives = "auto";
  std::string model_name = "model";
  std::string scheduling_policy = "fcfs";
  std::string log_level = "info";
  double step_timeout_seconds = 30;
  double join_timeout_seconds = 60;
  double drain_timeout_seconds = 30;
  double target_itl_ms = 0;
  double recovery_timeout_seconds = 30;
  uint64_t seed = 0;
  bool check = false;
};

void Declare(FlagParser& parser, Flags& flags) {
  GroupOptions& group = flags.loop.group;
  parser
      .Add("--listen", flags.server.addresses,
           "unix:/path or host:port; several times to listen in several places")
      .Required()
      .SplitAtCommas()
      .Repeatable();
  parser.Add("--workers", group.addresses, "addresses of the workers, by rank; group after group")
      .Required()
      .SplitAtCommas();
  parser.ShowDefaults();
  parser
      .Add("--data-parallel-size", flags.data_parallel_size,
           "groups of workers, each with the whole model")
      .Between(1, 1024);
  parser
      .Add("--max-model-len", group.max_model_len,
           "tokens of prompt and output together; 0: the model's limit, or what fits")
      .Between(0, std::numeric_limits<int>::max());
  parser.Add("--block-size", group.block_size, "tokens per KV block").OneOf({1, 16, 32, 64, 128});
  parser.AddSwitch("--enable-prefix-caching,!--no-enable-prefix-caching",
                   flags.loop.engine.enable_prefix_caching,
                   "requests that begin alike share KV blocks [on]");
  parser.Add("--max-num-seqs", group.max_sequences, "sequences per step").Between(1, 65536);
  parser.Add("--max-num-batched-tokens", group.max_tokens_per_step, "tokens per step")
      .Between(1, 1 << 20);
  parser
      .Add("--target-itl-ms", flags.target_itl_ms,
           "between two tokens of a stream: prompts are read in pieces so small that steps "
           "take no longer; 0: any time")
      .Between(0.0, 60000.0);
  parser.AddSwitch("--enable-expert-parallel", group.enable_expert_parallel,
                   "ranks own whole experts instead of a slice of each");
  parser
      .Add("--collectives", flags.collectives,
           "how workers add up; auto: on one host peer for GPUs and shm for CPUs, between "
           "hosts nccl and gloo")
      .OneOf({"auto", "peer", "nccl", "shm", "gloo"});
  parser
      .Add("--scheduling-policy", flags.scheduling_policy,
           "who comes first: who came first, or whose priority is lower")
      .OneOf({"fcfs", "priority"});
  parser
      .Add("--max-queued-requests", flags.loop.max_queued_requests,
           "requests of each group that may wait; more are refused")
      .Between(1, 1 << 20);
  parser
      .Add("--max-queued-tokens", flags.loop.max_queued_tokens,
           "tokens of prompts that may wait, unless one waits alone; 0: any")
      .Between(int64_t{0}, int64_t{1} << 40);
  parser
      .Add("--step-timeout-seconds", flags.step_timeout_seconds,
           "a worker silent for longer is lost")
      .Between(0.1, 86400.0);
  parser
      .Add("--join-timeout-seconds", flags.join_timeout_seconds,
           "for workers to find each other, after loading")
      .Between(0.1, 86400.0);
  parser
      .Add("--drain-timeout-seconds", flags.drain_timeout_seconds,
           "for running requests to finish after SIGTERM")
      .Between(0.0, 86400.0);
  parser
      .Add("--recovery-timeout-seconds", flags.recovery_timeout_seconds,
           "how long requests wait while no group can make steps; 0: not at all")
      .Between(0.0, 86400.0);
  parser.Add("--seed", flags.seed, "what the seeds of requests without one are drawn from");
  parser.Add("--served-model-name", flags.model_name, "label model_name of the metrics");
  parser.AddSwitch("--grpc-reflection", flags.server.enable_reflection, "let grpcurl list the API");
  TlsOptions& tls = flags.server.tls;
  parser.Add("--tls-certificate", tls.certificate_file, "PEM, this process");
  parser.Add("--tls-private-key", tls.private_key_file, "PEM");
  parser.Add("--tls-authority", tls.authority_file, "PEM, who signs the peers");
  parser.AddSwitch("--insecure", tls.allow_insecure_tcp, "speak in the clear with other hosts");
  parser.Add("--log-level", flags.log_level, "least severe messages to log")
      .OneOf({"debug", "info", "warn", "error"});
  parser.AddSwitch("--plan-is-known", group.is_plan_known,
                   "the operator was told the memory plan: log it at debug only");
  parser.AddSwitch(
      "--check", flags.check,
      "try flags, files and addresses, and the workers' addresses for their form; exit");
  parser.AddVersion(FATHOM_VERSION);
}

v1::JoinRequest::Collectives CollectivesOf(const std::string& name) {
  if (name == "peer") return v1::JoinRequest::COLLECTIVES_PEER;
  if (name == "nccl") return v1::JoinRequest::COLLECTIVES_NCCL;
  if (name == "shm") return v1::JoinRequest::COLLECTIVES_SHM;
  if (name == "gloo") return v1::JoinRequest::COLLECTIVES_GLOO;
  return v1::JoinRequest::COLLECTIVES_UNSPECIFIED;
}

// What follows from the flags.
void Complete(Flags& flags) {
  GroupOptions& group = flags.loop.group;
  group.tls = flags.server.tls;
  group.version = FATHOM_VERSION;
  group.collectives = CollectivesOf(flags.collectives);
  group.max_logit_rows = group.max_sequences + flags.loop.engine.max_prompt_logprob_rows_per_step;
  if (flags.scheduling_policy == "priority") flags.loop.engine.policy = SchedulingPolicy::kPriority;
  flags.loop.engine.target_itl = absl::Milliseconds(flags.target_itl_ms);
  group.step_timeout = absl::Seconds(flags.step_timeout_seconds);
  group.join_timeout = absl::Seconds(flags.join_timeout_seconds);
}

sigset_t StopSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

// First signal: drain. Second signal, or the end of patience: stop. Ends after the second, so the
// caller sends one to it when the router has ended by itself.
void HandleSignals(GroupRouter& router, double drain_timeout_seconds) {
  const sigset_t signals = StopSignals();
  int signal;
  sigwait(&signals, &signal);
  spdlog::info("draining: new requests are refused, running ones have {} s", drain_timeout_seconds);
  router.Drain();
  const auto whole_seconds = static_cast<time_t>(drain_timeout_seconds);
  const timespec patience = {
      .tv_sec = whole_seconds,
      .tv_nsec = static_cast<long>((drain_timeout_seconds - whole_seconds) * 1e9)};
  sigtimedwait(&signals, nullptr, &patience);
  router.Stop();
}

// The exit code that says whose fault it was.
int ReportFailure(const absl::Status& status) {
  spdlog::error("{}", std::string(status.message()));
  if (absl::IsInvalidArgument(status)) return kExitUsage;
  return absl::IsNotFound(status) ? kExitConfig : 1;
}

// A malformed address would never answer; better said now than after waiting.
absl::Status CheckWorkerAddresses(const GroupOptions& group) {
  for (const std::string& address : group.addresses) {
    RETURN_IF_ERROR(ConnectTo(address, group.tls).status());
  }
  return absl::OkStatus();
}

// Every group with its own workers.
absl::StatusOr<std::vector<StepLoop::Options>> GroupsOf(const Flags& flags) {
  const std::vector<std::string>& addresses = flags.loop.group.addresses;
  const size_t num_groups = static_cast<size_t>(flags.data_parallel_size);
  if (addresses.size() % num_groups != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--workers names ", addresses.size(), " workers: they make no ", num_groups,
                     " groups of the same size (--data-parallel-size)"));
  }
  const auto size = static_cast<std::ptrdiff_t>(addresses.size() / num_groups);
  std::vector<StepLoop::Options> groups(num_groups, flags.loop);
  auto begin = addresses.begin();
  for (StepLoop::Options& group : groups) {
    group.group.addresses.assign(begin, begin + size);
    begin += size;
  }
  return groups;
}

int Serve(const Flags& flags) {
  if (const absl::Status status = CheckWorkerAddresses(flags.loop.group); !status.ok()) {
    return ReportFailure(status);
  }
  absl::StatusOr<std::vector<StepLoop::Options>> groups = GroupsOf(flags);
  if (!groups.ok()) return ReportFailure(groups.status());
  Metrics metrics(flags.model_name);
  GenerateServer* server_for_health = nullptr;  // set before the loop starts
  GroupRouter router({.version = FATHOM_VERSION,
                      .groups = *std::move(groups),
                      .recovery_timeout = absl::Seconds(flags.recovery_timeout_seconds)},
                     metrics, [&](bool serving) { server_for_health->SetServing(serving); });
  Admission admission(flags.seed, router, metrics);
  GenerateService service(admission, router, metrics);
  absl::StatusOr<std::unique_ptr<GenerateServer>> server =
      GenerateServer::Start(flags.server, service);
  if (!server.ok()) return ReportFailure(server.status());
  if (flags.check) return 0;
  server_for_health = server->get();
  spdlog::info("fathom-coordinator {} listens on {}", FATHOM_VERSION,
               absl::StrJoin(flags.server.addresses, " and "));

  router.Start();
  std::thread signal_thread([&] { HandleSignals(router, flags.drain_timeout_seconds); });
  router.Join();
  pthread_kill(signal_thread.native_handle(), SIGTERM);
  signal_thread.join();
  spdlog::info("stopped");
  return 0;
}

int Main(int argc, char** argv) {
  Flags flags;
  FlagParser parser("Schedules the steps of a group of workers and serves fathom.v1.Generate.",
                    "fathom-coordinator");
  Declare(parser, flags);
  if (const std::optional<int> code = parser.Parse(argc, argv)) return *code;
  Complete(flags);
  spdlog::set_default_logger(spdlog::stderr_logger_mt("coordinator"));
  spdlog::set_pattern("%L %H:%M:%S.%e %v");
  spdlog::set_level(spdlog::level::from_str(flags.log_level));
  // A line for each text of a client that is not UTF-8: whoever sends many would fill the log.
  google::protobuf::SetLogHandler([](google::protobuf::LogLevel, const char*, int,
                                     const std::string& message) { spdlog::debug("{}", message); });

  // Before any thread exists, so that all of them leave these signals to the one that waits.
  const sigset_t signals = StopSignals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  return Serve(flags);
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) { return fathom::Main(argc, argv); }
