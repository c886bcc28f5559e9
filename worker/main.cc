// fathom-worker: one shard of the model, at the coordinator's service.
#include <pthread.h>
#include <signal.h>
#include <sysexits.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "base/flag_parser.h"
#include "base/status_macros.h"
#include "grpcpp/resource_quota.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "kernels/device.h"
#include "proto/endpoint.h"
#include "proto/worker.pb.h"
#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"
#include "worker/shard_keeper.h"
#include "worker/simulated_keeper.h"
#include "worker/worker_service.h"

namespace fathom {
namespace {

// What --check assumes the coordinator will ask for besides a row of logits per sequence.
constexpr uint32_t kPromptLogprobRows = 256;
// Patience with calls that do not end when the server shuts down, such as a Join that is loading.
constexpr absl::Duration kShutdownTime = absl::Seconds(2);

struct Flags {
  std::string listen_address;
  TlsOptions tls;
  std::string log_level = "info";
  std::string device = "cpu";
  std::string sim_profile;
  DeviceOptions device_options;
  std::string dtype = "auto";
  std::string kv_cache_dtype = "auto";
  std::string quantization = "none";
  std::string activation_quantization = "auto";
  std::string load_format = "auto";
  int64_t kv_cache_memory_bytes = 0;
  double drain_timeout_seconds = 35.0;
  ShardKeeperOptions keeper;

  bool check = false;
  uint32_t rank = 0;
  uint32_t world_size = 1;
  bool enable_expert_parallel = false;
  uint32_t block_size = 16;
  uint32_t max_model_len = 0;
  uint32_t max_num_seqs = 256;
  uint32_t max_num_batched_tokens = 2048;
};

void DeclareServing(FlagParser& parser, Flags& flags) {
  parser.Add("--listen", flags.listen_address,
             "unix:/path or host:port; required, except with --check");
  parser.Add("--threads", flags.device_options.num_threads, "threads that share each operation")
      .Between(1, 1024);
  parser
      .Add("--drain-timeout-seconds", flags.drain_timeout_seconds,
           "on SIGTERM, how long to go on making steps for a coordinator that drains")
      .Between(0.0, 86400.0);
  parser.Add("--tls-certificate", flags.tls.certificate_file, "PEM, this process");
  parser.Add("--tls-private-key", flags.tls.private_key_file, "PEM");
  parser.Add("--tls-authority", flags.tls.authority_file, "PEM, who signs the peers");
  parser.AddSwitch("--insecure", flags.tls.allow_insecure_tcp,
                   "speak in the clear with other hosts");
  parser.Add("--log-level", flags.log_level, "least severe messages to log")
      .OneOf({"debug", "info", "warn", "error"});
  parser.AddVersion(FATHOM_VERSION);
}

void DeclareModel(FlagParser& parser, Flags& flags) {
  parser.Add("--model", flags.keeper.model_directory, "folder with config.json and *.safetensors")
      .Required();
  parser.Add("--device", flags.device, "cpu, cuda, or sim: no model, but its times")
      .OneOf({"cpu", "cuda", "sim"});
  parser.Add("--sim-profile", flags.sim_profile,
             "with --device sim: JSON file that says how long steps take; --model needs no "
             "more than config.json");
  parser
      .Add("--gpu", flags.device_options.gpu,
           "with --device cuda: which GPU, of those in CUDA_VISIBLE_DEVICES or of all")
      .LastCounts()
      .Between(0, 1023);
  parser
      .Add("--dtype", flags.dtype, "of activations; auto is float32 on the CPU, bfloat16 on a GPU")
      .OneOf({"auto", "float32", "bfloat16"});
  parser
      .Add("--quantization", flags.quantization,
           "fp8: quantise linear layers in 128x128 blocks while loading")
      .OneOf({"none", "fp8"});
  parser
      .Add("--activation-quantization", flags.activation_quantization,
           "of what FP8 weights are multiplied with, in 1x128 blocks; auto is fp8 on a GPU "
           "if the weights are, none on the CPU")
      .OneOf({"auto", "none", "fp8"});
  parser
      .Add("--kv-cache-dtype", flags.kv_cache_dtype,
           "auto is the one of activations, fp8_e4m3 is fp8")
      .OneOf({"auto", "float32", "bfloat16", "fp8", "fp8_e4m3"});
  parser
      .Add("--load-format", flags.load_format,
           "dummy: random weights, --model needs no more than config.json")
      .OneOf({"auto", "dummy"});
  parser
      .Add("--kv-cache-memory-bytes", flags.kv_cache_memory_bytes,
           "memory for KV blocks; without it what --gpu-memory-utilization leaves, and on the "
           "CPU at most 512 MiB per worker")
      .Between(int64_t{1}, int64_t{1} << 50);
  parser
      .Add("--gpu-memory-utilization", flags.keeper.memory.gpu_memory_utilization,
           "share of its GPU's memory that this worker may take; on the CPU, of the host's "
           "that all workers together may")
      .Between(0.01, 1.0);
}

void DeclareCheck(FlagParser& parser, Flags& flags) {
  parser.AddSwitch(
      "--check", flags.check,
      "check configuration, checkpoint and memory plan of one shard, print the plan, exit");
  parser.Add("--rank", flags.rank, "with --check").InGroup("Check");
  parser.Add("--world-size", flags.world_size, "with --check").InGroup("Check");
  parser.AddSwitch("--enable-expert-parallel", flags.enable_expert_parallel, "with --check")
      .InGroup("Check");
  parser.Add("--block-size", flags.block_size, "with --check").InGroup("Check");
  parser.Add("--max-model-len", flags.max_model_len, "with --check; 0: what fits").InGroup("Check");
  parser.Add("--max-num-seqs", flags.max_num_seqs, "with --check").InGroup("Check");
  parser.Add("--max-num-batched-tokens", flags.max_num_batched_tokens, "with --check")
      .InGroup("Check");
}

void Complete(Flags& flags) {
  ShardKeeperOptions& keeper = flags.keeper;
  if (const char* const visible = std::getenv("CUDA_VISIBLE_DEVICES"); visible != nullptr) {
    flags.device_options.cuda_visible_devices = visible;
  }
  const bool is_cuda = flags.device == "cuda";
  keeper.dtype =
      flags.dtype == "bfloat16" || (flags.dtype == "auto" && is_cuda) ? DType::kBF16 : DType::kF32;
  keeper.kv_cache_dtype = flags.kv_cache_dtype == "auto"       ? keeper.dtype
                          : flags.kv_cache_dtype == "float32"  ? DType::kF32
                          : flags.kv_cache_dtype == "bfloat16" ? DType::kBF16
                                                               : DType::kF8E4M3;
  keeper.quantization = flags.quantization == "fp8" ? Quantization::kFp8 : Quantization::kNone;
  keeper.activation_quantization =
      flags.activation_quantization == "auto"  ? ActivationQuantization::kAuto
      : flags.activation_quantization == "fp8" ? ActivationQuantization::kFp8
                                               : ActivationQuantization::kNone;
  keeper.load_format = flags.load_format == "dummy" ? LoadFormat::kDummy : LoadFormat::kAuto;
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  keeper.grammar_program = self.parent_path() / "fathom-grammar";
  if (flags.kv_cache_memory_bytes > 0) {
    keeper.memory.kv_cache_memory_bytes = flags.kv_cache_memory_bytes;
  }
}

// What the memory plan divides.
void MeasureMemory(const Device& device, ShardKeeperOptions& keeper) {
  if (device.shares_host_memory()) {
    keeper.host_bytes = HostMemoryBytes();
    return;
  }
  keeper.host_bytes = device.TotalBytes();
  keeper.available_bytes = device.AvailableBytes();
  keeper.memory.default_kv_cache_limit_bytes = std::numeric_limits<int64_t>::max();
}

int Fail(int exit_status, const absl::Status& status) {
  spdlog::error("{}", std::string(status.message()));
  return exit_status;
}

v1::ShardSpec CheckedShard(const Flags& flags) {
  v1::ShardSpec shard;
  shard.set_rank(flags.rank);
  shard.set_world_size(flags.world_size);
  shard.set_enable_expert_parallel(flags.enable_expert_parallel);
  shard.set_block_size(flags.block_size);
  shard.set_max_tokens_per_step(flags.max_num_batched_tokens);
  shard.set_max_sequences(flags.max_num_seqs);
  shard.set_max_model_len(flags.max_model_len);
  shard.set_workers_on_this_host(flags.world_size);
  shard.set_max_logit_rows(flags.max_num_seqs + kPromptLogprobRows);
  return shard;
}

// Prints one line of JSON. The strings need no escapes: they are names from fixed lists.
int Check(const Flags& flags, const ShardHost& host) {
  const v1::ShardSpec shard = CheckedShard(flags);
  const absl::StatusOr<WorkerMemoryPlan> plan = host.Plan(shard);
  if (!plan.ok()) return Fail(EX_CONFIG, plan.status());
  const int64_t blocks_per_sequence =
      (plan->max_model_len + int64_t{flags.block_size} - 1) / flags.block_size;
  const int64_t num_kv_blocks =
      std::min<int64_t>(plan->kv_block_capacity, flags.max_num_seqs * blocks_per_sequence);
  v1::DescribeResponse model;
  host.Describe(model);
  absl::PrintF(
      "{\"architecture\":\"%s\",\"vocab_size\":%d,\"max_position_embeddings\":%d,"
      "\"world_size\":%d,\"dtype\":\"%s\",\"kv_cache_dtype\":\"%s\",\"quantization\":\"%s\","
      "\"activation_quantization\":\"%s\",\"budget_bytes\":%d,\"weight_bytes\":%d,\"activation_"
      "bytes\":%d,\"kv_block_bytes\":%d,"
      "\"kv_block_capacity\":%d,\"num_kv_blocks\":%d,\"max_model_len\":%d}\n",
      model.architecture(), model.vocab_size(), model.max_position_embeddings(), shard.world_size(),
      model.dtype(), model.kv_cache_dtype(), model.quantization(), model.activation_quantization(),
      plan->budget_bytes, plan->weight_bytes, plan->activation_bytes, plan->kv_block_bytes,
      plan->kv_block_capacity, num_kv_blocks, plan->max_model_len);
  return EXIT_SUCCESS;
}

absl::Status CheckSocketFolder(const std::string& address) {
  if (!absl::StartsWith(address, "unix:")) return absl::OkStatus();
  const std::filesystem::path folder = std::filesystem::path(address.substr(5)).parent_path();
  std::error_code error;
  if (folder.empty() || std::filesystem::is_directory(folder, error)) return absl::OkStatus();
  return absl::NotFoundError(
      absl::StrCat("cannot listen on '", address, "': there is no folder '", folder.string(), "'"));
}

absl::StatusOr<std::unique_ptr<grpc::Server>> Listen(const Flags& flags, WorkerService& service) {
  ASSIGN_OR_RETURN(const std::shared_ptr<grpc::ServerCredentials> credentials,
                   ServerCredentialsFor(flags.listen_address, flags.tls));
  RETURN_IF_ERROR(CheckSocketFolder(flags.listen_address));
  RETURN_IF_ERROR(PrepareToListen(flags.listen_address));
  grpc::ServerBuilder builder;
  ConfigureServer(builder);
  builder.AddListeningPort(flags.listen_address, credentials);
  builder.RegisterService(&service);
  std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr) {
    return absl::UnavailableError(absl::StrCat("cannot listen on '", flags.listen_address,
                                               "': is the port in use, or not ours to take?"));
  }
  return server;
}

sigset_t StopSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

// Returns when the first signal has come and the steps are done, or patience is over, or the second
// has come.
void WaitForStop(const Flags& flags, WorkerService& service) {
  const sigset_t signals = StopSignals();
  int signal;
  sigwait(&signals, &signal);
  if (service.WaitUntilIdle(absl::Now())) return;
  spdlog::info("stopping: the coordinator has {} s to end its steps", flags.drain_timeout_seconds);
  const absl::Time deadline = absl::Now() + absl::Seconds(flags.drain_timeout_seconds);
  while (absl::Now() < deadline) {
    if (service.WaitUntilIdle(absl::Now() + absl::Milliseconds(50))) return;
    const timespec no_time = {};
    if (sigtimedwait(&signals, nullptr, &no_time) > 0) return;
  }
}

int Serve(const Flags& flags, ShardHost& host) {
  WorkerService service({.version = FATHOM_VERSION, .tls = flags.tls}, host);
  absl::StatusOr<std::unique_ptr<grpc::Server>> server = Listen(flags, service);
  if (!server.ok()) {
    return Fail(absl::IsInvalidArgument(server.status()) ? EX_USAGE : EXIT_FAILURE,
                server.status());
  }
  v1::DescribeResponse model;
  host.Describe(model);
  spdlog::info("fathom-worker {} listens on {}: {}, dtype {}, kv-cache-dtype {}", FATHOM_VERSION,
               flags.listen_address, model.architecture(), model.dtype(), model.kv_cache_dtype());
  if (flags.device == "sim") {
    spdlog::warn("--device sim: there is no model, tokens are hashes of the text before them");
  } else if (flags.keeper.load_format == LoadFormat::kDummy) {
    spdlog::warn("--load-format dummy: the weights are random, and so is what the model says");
  }
  if (flags.device == "cpu" && !flags.keeper.memory.kv_cache_memory_bytes.has_value()) {
    spdlog::info("KV blocks take at most {} MiB; --kv-cache-memory-bytes gives them more",
                 flags.keeper.memory.default_kv_cache_limit_bytes >> 20);
  }
  WaitForStop(flags, service);
  service.Close();
  absl::Notification is_down;
  std::thread shutdown([&] {
    (*server)->Shutdown(absl::ToChronoTime(absl::Now() + kShutdownTime));
    is_down.Notify();
  });
  if (!is_down.WaitForNotificationWithTimeout(2 * kShutdownTime)) {
    spdlog::warn("stopped while loading");
    spdlog::shutdown();
    _exit(EXIT_SUCCESS);
  }
  shutdown.join();
  spdlog::info("stopped");
  return EXIT_SUCCESS;
}

template <typename Host>
int CheckOrServe(const Flags& flags, const absl::StatusOr<std::unique_ptr<Host>>& host) {
  if (!host.ok()) return Fail(EX_CONFIG, host.status());
  return flags.check ? Check(flags, **host) : Serve(flags, **host);
}

int Main(int argc, char** argv) {
  Flags flags;
  FlagParser parser("Holds one shard of a model and makes the coordinator's steps with it.",
                    "fathom-worker");
  DeclareServing(parser, flags);
  DeclareModel(parser, flags);
  DeclareCheck(parser, flags);
  if (const std::optional<int> code = parser.Parse(argc, argv)) return *code;
  Complete(flags);
  spdlog::set_default_logger(spdlog::stderr_logger_mt("worker"));
  spdlog::set_pattern("%L %H:%M:%S.%e %v");
  spdlog::set_level(spdlog::level::from_str(flags.log_level));
  if (!flags.check && flags.listen_address.empty()) {
    return Fail(EX_USAGE, absl::InvalidArgumentError("--listen is required, except with --check"));
  }

  if ((flags.device == "sim") == flags.sim_profile.empty()) {
    return Fail(EX_USAGE, absl::InvalidArgumentError(
                              "--device sim and --sim-profile go together: give both or none"));
  }

  // Before any thread exists, so that all of them leave these signals to the one that waits.
  const sigset_t signals = StopSignals();
  if (!flags.check) pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);

  if (flags.device == "sim") {
    return CheckOrServe(flags,
                        SimulatedKeeper::Open({.model_directory = flags.keeper.model_directory,
                                               .profile_file = flags.sim_profile}));
  }
  absl::StatusOr<std::unique_ptr<Device>> device = flags.device == "cuda"
                                                       ? OpenCudaDevice(flags.device_options)
                                                       : OpenCpuDevice(flags.device_options);
  if (!device.ok()) return Fail(EX_USAGE, device.status());
  MeasureMemory(**device, flags.keeper);
  return CheckOrServe(flags, ShardKeeper::Open(flags.keeper, *std::move(device)));
}

}  // namespace
}  // namespace fathom

int main(int argc, char** argv) { return fathom::Main(argc, argv); }
