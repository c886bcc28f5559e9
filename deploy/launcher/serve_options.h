// What `fathom serve` and `fathom check` are asked to do: the values of their flags.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace fathom {

struct ServeOptions {
  std::string model_dir;
  std::vector<std::string> served_model_names;  // empty: model_dir as given

  std::string chat_encoding = "auto";  // how chats become prompts; auto: as the model's files say

  // The HTTP server's address. Port 0: any free one.
  std::string host = "0.0.0.0";
  int port = 8000;
  std::string grpc_listen;  // where gRPC clients reach the coordinator; empty: nowhere
  bool grpc_reflection = false;

  // Limits of the HTTP server, keys, certificate; with their values.
  std::vector<std::string> gateway_flags;
  bool gateway_reloads = false;  // some of them name files that it reads again at SIGHUP
  bool has_keys = false;         // among them
  bool https = false;

  // How the model is cut and computed.
  std::string device = "cpu";
  std::string sim_profile;       // with device sim: the file that says how long steps take
  int tensor_parallel_size = 1;  // workers of a group
  int data_parallel_size = 1;    // groups, each with the whole model
  bool enable_expert_parallel = false;
  std::string dtype = "auto";                    // of activations: auto, float32, bfloat16
  std::string quantization = "none";             // none, fp8
  std::string activation_quantization = "auto";  // auto, none, fp8
  std::string load_format = "auto";              // auto, dummy: random weights
  int threads = 0;                   // per worker; 0: the cores shared out among the workers
  std::string collectives = "auto";  // auto, peer, nccl, shm, gloo
  std::vector<int> gpus;             // by worker; workers may share one. Empty: 0, 1, …
  uint64_t seed = 0;

  // Memory.
  std::string kv_cache_dtype = "auto";  // auto, float32, bfloat16, fp8
  int64_t kv_cache_memory_bytes = 0;    // per worker; 0: what the utilisation leaves
  double gpu_memory_utilization = 0.9;  // share of the device's memory; on a CPU of the host's
  int block_size = 0;                   // tokens per KV block; 0: the default, kDefaultBlockSize
  int64_t max_model_len = 0;            // tokens; 0: the model's limit, or what fits
  bool enable_prefix_caching = true;    // requests that begin alike share KV blocks

  // How much is done at once.
  int64_t max_num_seqs = 256;
  int64_t max_num_batched_tokens = 2048;
  int64_t max_queued_requests = 1024;
  int64_t max_queued_tokens = 0;           // 0: any
  std::string scheduling_policy = "fcfs";  // fcfs, priority
  double target_itl_ms = 0;                // between tokens of a stream; 0: any

  // Time limits in seconds.
  int step_timeout_seconds = 30;
  int join_timeout_seconds = 60;
  int drain_timeout_seconds = 30;
  int recovery_timeout_seconds = 30;

  // Passed to the coordinator, for --grpc-listen on a network.
  std::string tls_certificate;
  std::string tls_private_key;
  std::string tls_authority;
  bool insecure = false;

  std::string log_level = "info";
  std::string run_directory;  // empty: a new one under XDG_RUNTIME_DIR or /tmp
  std::string ready_file;     // empty: none
};

inline constexpr int kDefaultBlockSize = 16;

// Workers are numbered through all groups: those of group 0 by rank, then those of group 1, …
inline int NumWorkers(const ServeOptions& options) {
  return options.tensor_parallel_size * options.data_parallel_size;
}

// The GPU of a worker, and how many workers it computes for.
inline int GpuOf(const ServeOptions& options, int worker) {
  return options.gpus.empty() ? worker : options.gpus[worker];
}
inline int WorkersOnGpu(const ServeOptions& options, int gpu) {
  if (options.gpus.empty()) return 1;
  return static_cast<int>(std::count(options.gpus.begin(), options.gpus.end(), gpu));
}

// The block size in force.
inline int BlockSizeOf(const ServeOptions& options) {
  return options.block_size == 0 ? kDefaultBlockSize : options.block_size;
}

}  // namespace fathom
