#include "deploy/launcher/process_plan.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace fathom {
namespace {

// An argument list that grows by flags and their values.
class Arguments {
 public:
  explicit Arguments(std::string program) : list_{std::move(program)} {}
  template <typename Value>
  Arguments& Add(const char* flag, const Value& value) {
    list_.push_back(flag);
    list_.push_back(absl::StrCat(value));
    return *this;
  }
  template <typename Value>
  Arguments& AddUnless(const Value& absent, const char* flag, const Value& value) {
    return value == absent ? *this : Add(flag, value);
  }
  Arguments& AddIf(bool wanted, const char* flag) {
    if (wanted) list_.push_back(flag);
    return *this;
  }
  std::vector<std::string> list() && { return std::move(list_); }

 private:
  std::vector<std::string> list_;
};

std::string WorkerSocket(const std::string& run_dir, int worker) {
  return absl::StrCat(run_dir, "/worker-", worker, ".sock");
}

std::string CoordinatorSocket(const std::string& run_dir) {
  return absl::StrCat(run_dir, "/coordinator.sock");
}

int ThreadsPerWorker(const ServeOptions& options) {
  if (options.threads != 0) return options.threads;
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  return std::max(1, cores / NumWorkers(options));
}

// What a worker needs to know whether it serves or checks. Of a host's memory the workers of a
// group take their shares themselves.
Arguments WorkerArguments(const ServeOptions& options, const std::string& program_dir, int worker) {
  const bool has_gpu = options.device == "cuda";
  const int gpu = GpuOf(options, worker);
  const int sharing = has_gpu ? WorkersOnGpu(options, gpu) : options.data_parallel_size;
  Arguments arguments(program_dir + "/fathom-worker");
  arguments.Add("--model", options.model_dir)
      .Add("--device", options.device)
      .AddUnless<std::string>("", "--sim-profile", options.sim_profile)
      .Add("--dtype", options.dtype)
      .Add("--quantization", options.quantization)
      .Add("--activation-quantization", options.activation_quantization)
      .Add("--load-format", options.load_format)
      .Add("--kv-cache-dtype", options.kv_cache_dtype)
      .AddUnless<int64_t>(0, "--kv-cache-memory-bytes", options.kv_cache_memory_bytes)
      .Add("--gpu-memory-utilization", options.gpu_memory_utilization / sharing)
      .Add("--threads", ThreadsPerWorker(options));
  if (has_gpu) arguments.Add("--gpu", gpu);
  return arguments;
}

// The worker most likely to be refused: of those with the least memory the one with the last GPU.
int ScarcestWorker(const ServeOptions& options) {
  if (options.device != "cuda") return 0;
  const auto scarcity = [&](int worker) {
    const int gpu = GpuOf(options, worker);
    return std::pair(WorkersOnGpu(options, gpu), gpu);
  };
  int scarcest = 0;
  for (int worker = 1; worker < NumWorkers(options); ++worker) {
    if (scarcity(worker) > scarcity(scarcest)) scarcest = worker;
  }
  return scarcest;
}

ProcessSpec PlanWorker(const ServeOptions& options, const Places& places, int worker) {
  Arguments arguments = WorkerArguments(options, places.program_dir, worker);
  arguments.Add("--listen", "unix:" + WorkerSocket(places.run_dir, worker))
      .Add("--log-level", options.log_level);
  return {.name = absl::StrCat("worker ", worker),
          .arguments = std::move(arguments).list(),
          .stop_stage = 1};
}

// `own_address` is where the gateway reaches it.
ProcessSpec PlanCoordinator(const ServeOptions& options, const Places& places,
                            const std::string& own_address) {
  std::vector<std::string> workers;
  for (int worker = 0; worker < NumWorkers(options); ++worker) {
    workers.push_back("unix:" + WorkerSocket(places.run_dir, worker));
  }
  Arguments arguments(places.program_dir + "/fathom-coordinator");
  arguments.Add("--listen", own_address)
      .AddUnless<std::string>("", "--listen", options.grpc_listen)
      .Add("--workers", absl::StrJoin(workers, ","))
      .AddUnless(1, "--data-parallel-size", options.data_parallel_size)
      .Add("--served-model-name", ServedModelName(options))
      .Add("--max-model-len", options.max_model_len)
      .Add("--block-size", BlockSizeOf(options))
      .AddIf(!options.enable_prefix_caching, "--no-enable-prefix-caching")
      .Add("--max-num-seqs", options.max_num_seqs)
      .Add("--max-num-batched-tokens", options.max_num_batched_tokens)
      .AddUnless(0.0, "--target-itl-ms", options.target_itl_ms)
      .AddIf(options.enable_expert_parallel, "--enable-expert-parallel")
      .Add("--collectives", options.collectives)
      .Add("--max-queued-requests", options.max_queued_requests)
      .AddUnless<int64_t>(0, "--max-queued-tokens", options.max_queued_tokens)
      .AddUnless<std::string>("fcfs", "--scheduling-policy", options.scheduling_policy)
      .Add("--step-timeout-seconds", options.step_timeout_seconds)
      .Add("--join-timeout-seconds", options.join_timeout_seconds)
      .Add("--drain-timeout-seconds", options.drain_timeout_seconds)
      .Add("--recovery-timeout-seconds", options.recovery_timeout_seconds)
      .Add("--seed", options.seed)
      .AddIf(options.grpc_reflection, "--grpc-reflection")
      .AddIf(true, "--plan-is-known")
      .AddUnless<std::string>("", "--tls-certificate", options.tls_certificate)
      .AddUnless<std::string>("", "--tls-private-key", options.tls_private_key)
      .AddUnless<std::string>("", "--tls-authority", options.tls_authority)
      .AddIf(options.insecure, "--insecure")
      .Add("--log-level", options.log_level);
  return {.name = "coordinator", .arguments = std::move(arguments).list()};
}

ProcessSpec PlanGateway(const ServeOptions& options, const Places& places) {
  Arguments arguments(places.program_dir + "/fathom-gateway");
  arguments.Add("--coordinator", "unix:" + CoordinatorSocket(places.run_dir))
      .Add("--model", options.model_dir)
      .Add("--chat-encoding", options.chat_encoding)
      .Add("--host", options.host)
      .Add("--port", options.port)
      .Add("--drain-timeout-seconds", options.drain_timeout_seconds)
      .Add("--log-level", options.log_level);
  std::vector<std::string> list = std::move(arguments).list();
  list.insert(list.end(), options.gateway_flags.begin(), options.gateway_flags.end());
  list.push_back("--served-model-name");
  if (options.served_model_names.empty()) list.push_back(ServedModelName(options));
  list.insert(list.end(), options.served_model_names.begin(), options.served_model_names.end());
  return {.name = "gateway", .arguments = std::move(list), .reloads = options.gateway_reloads};
}

}  // namespace

std::vector<ProcessSpec> PlanProcesses(const ServeOptions& options, const Places& places) {
  std::vector<ProcessSpec> processes;
  for (int worker = 0; worker < NumWorkers(options); ++worker) {
    processes.push_back(PlanWorker(options, places, worker));
  }
  processes.push_back(
      PlanCoordinator(options, places, "unix:" + CoordinatorSocket(places.run_dir)));
  processes.push_back(PlanGateway(options, places));
  return processes;
}

ProcessSpec PlanWorkerCheck(const ServeOptions& options, const std::string& program_dir) {
  const int worker = ScarcestWorker(options);
  Arguments arguments = WorkerArguments(options, program_dir, worker);
  arguments.AddIf(true, "--check")
      .Add("--rank", worker % options.tensor_parallel_size)
      .Add("--world-size", options.tensor_parallel_size)
      .AddIf(options.enable_expert_parallel, "--enable-expert-parallel")
      .Add("--block-size", BlockSizeOf(options))
      .Add("--max-model-len", options.max_model_len)
      .Add("--max-num-seqs", options.max_num_seqs)
      .Add("--max-num-batched-tokens", options.max_num_batched_tokens);
  return {.name = "worker", .arguments = std::move(arguments).list()};
}

ProcessSpec PlanCoordinatorCheck(const ServeOptions& options, const std::string& program_dir) {
  // There is no run directory yet; any address that is free will do.
  ProcessSpec process = PlanCoordinator(options, {program_dir, ""}, "127.0.0.1:0");
  process.arguments.push_back("--check");
  return process;
}

ProcessSpec PlanGatewayCheck(const ServeOptions& options, const std::string& program_dir) {
  ProcessSpec process = PlanGateway(options, {program_dir, ""});
  process.arguments.push_back("--check");
  return process;
}

size_t LongestSocketPath(const ServeOptions& options, const std::string& run_dir) {
  return std::max(CoordinatorSocket(run_dir).size(),
                  WorkerSocket(run_dir, NumWorkers(options) - 1).size());
}

std::string ServedModelName(const ServeOptions& options) {
  return options.served_model_names.empty() ? options.model_dir
                                            : options.served_model_names.front();
}

}  // namespace fathom
