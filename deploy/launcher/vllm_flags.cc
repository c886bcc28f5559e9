#include "deploy/launcher/vllm_flags.h"

#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/str_split.h"

namespace fathom {
namespace {

constexpr NeedlessFlag kNeedlessFlags[] = {
    {"--trust-remote-code", "", "the architecture is built in, no model's code is run"},
    {"--enable-chunked-prefill", "", "prompts are always cut to the token budget"},
    {"--enforce-eager", "", "there are no graphs to capture on this device"},
    {"--async-scheduling", "", "the next step is always chosen while the workers make one"},
    {"--disable-log-requests", "",
     "prompts and parameters are never logged; one line per request is, see --log-level"},
    {"--no-enable-log-requests", "",
     "prompts and parameters are never logged; one line per request is, see --log-level"},
    {"--disable-fastapi-docs", "", "there are none"},
    {"--exclude-tools-when-tool-choice-none", "", "with tool_choice none tools are always hidden"},
    {"--disable-sliding-window", "", "these models attend to all of a sequence"},
    {"--preemption-mode", "recompute", "preempted requests are recomputed"},
    {"--use-tqdm-on-load", "", "the log says how loading goes on"},
    {"--enable-request-id-headers", "", "every response has an X-Request-Id"},
    {"--enable-prompt-tokens-details", "", "every usage has cached_tokens"},
    {"--enable-server-load-tracking", "", "/load always counts"},
    {"--enable-tokenizer-info-endpoint", "", "/tokenizer_info is always there"},
    {"--tokenizer-mode", "auto|deepseek_v32",
     "tokenizer and encoding are chosen by the model folder, see --chat-encoding"},
    {"--enable-auto-tool-choice", "", "requests with tools may call them"},
    {"--tool-call-parser", "deepseek_v3|deepseek_v31|deepseek_v32|kimi_k2",
     "tool calls are read as the chat encoding writes them, see --chat-encoding"},
    {"--reasoning-parser", "deepseek_r1|deepseek_v3|deepseek_v32|kimi_k2",
     "thoughts are read as the chat encoding writes them, see --chat-encoding"},
    {"--distributed-executor-backend", "mp", "workers are processes of this host"},
    {"--pipeline-parallel-size", "1",
     "layers are not split over workers, see --tensor-parallel-size"},
    {"--decode-context-parallel-size", "1", "the KV of a request is not split over workers"},
    {"--nnodes", "1", "this runs on one host; deploy/systemd has units for several"},
    {"--api-server-count", "1", "one gateway serves all; deploy/systemd runs more"},
    {"--cpu-offload-gb", "0", "weights are held in the workers' own memory"},
    {"--swap-space", "0", "preempted requests are recomputed, not swapped"},
    {"--generation-config", "auto", "generation_config.json of the model folder is read"},
    {"--runner", "auto|generate", "these models generate text"},
    {"--config-format", "auto|hf", "config.json is read"},
    {"--safetensors-load-strategy", "lazy", "each worker reads the slices it needs"},
    {"--logprobs-mode", "raw_logprobs",
     "they are those of the model, whatever is sampled from them"},
    {"--stream-interval", "1", "every token is sent as it comes"},
    {"--prefix-caching-hash-algo", "sha256|sha256_cbor|xxhash|xxhash_cbor",
     "blocks are found by a keyed hash and compared token by token"},
};

// Names are separated by spaces.
struct RefusedFamily {
  const char* names;
  const char* reason;
};

constexpr RefusedFamily kRefusedFamilies[] = {
    {"--no-enable-chunked-prefill", "prompts are always cut to the token budget"},
    {"--no-async-scheduling", "the next step is always chosen while the workers make one"},
    {"--speculative-config", "speculative decoding comes with a later version"},
    {"--tokenizer --tokenizer-revision --skip-tokenizer-init",
     "the tokenizer is the tokenizer.json of the model folder"},
    {"--revision --code-revision --download-dir --hf-token --hf-config-path",
     "nothing is downloaded: MODEL_DIR is a folder with the checkpoint"},
    {"--hf-overrides --override-generation-config --model-loader-extra-config",
     "config.json and generation_config.json of the model folder are what counts; change them"},
    {"--ignore-patterns", "what is read is what model.safetensors.index.json names"},
    {"--chat-template --chat-template-content-format --trust-request-chat-template",
     "encodings are built in, no template is executed; see --chat-encoding"},
    {"--default-chat-template-kwargs --response-role", "requests say it for themselves"},
    {"--tool-parser-plugin --reasoning-parser-plugin --logits-processors --io-processor-plugin "
     "--middleware --scheduler-cls --worker-cls --worker-extension-cls --tool-server "
     "--additional-config",
     "no code of others is loaded"},
    {"--ssl-ca-certs --ssl-cert-reqs", "clients are known by their keys, see --api-key-file"},
    {"--enable-ssl-refresh", "SIGHUP reads certificates again"},
    {"--ssl-ciphers", "the ciphers of TLS 1.2 and 1.3 that OpenSSL thinks secure are offered"},
    {"--h11-max-incomplete-event-size --h11-max-header-count",
     "see --max-header-bytes, --max-header-fields and --max-body-bytes"},
    {"--tokens-only", "programs with token ids of their own can use --grpc-listen"},
    {"--uds --root-path", "HTTP is served at --host and --port; put a proxy before it"},
    {"--enable-lora --lora-modules --max-loras --max-lora-rank --max-cpu-loras --lora-dtype "
     "--fully-sharded-loras --default-mm-loras",
     "adapters (LoRA) are not supported"},
    {"--limit-mm-per-prompt --mm-processor-kwargs --mm-processor-cache-gb --mm-encoder-tp-mode "
     "--media-io-kwargs --allowed-local-media-path --allowed-media-domains --skip-mm-profiling "
     "--interleave-mm-strings --enable-mm-embeds --enable-prompt-embeds",
     "these models read text only"},
    {"--kv-transfer-config --kv-events-config --ec-transfer-config --kv-offloading-size "
     "--kv-offloading-backend",
     "KV stays with the workers that have made it"},
    {"--num-gpu-blocks-override --calculate-kv-scales --kv-sharing-fast-prefill",
     "the KV cache follows the memory plan, see --kv-cache-memory-bytes and --kv-cache-dtype"},
    {"--enable-eplb --eplb-config --enable-dbo --all2all-backend --expert-placement-strategy "
     "--prefill-context-parallel-size",
     "experts and requests are not moved between workers; see --enable-expert-parallel"},
    {"--data-parallel-rank --data-parallel-start-rank --data-parallel-size-local "
     "--data-parallel-address --data-parallel-rpc-port --data-parallel-backend "
     "--data-parallel-hybrid-lb --data-parallel-external-lb --disable-frontend-multiprocessing",
     "one coordinator has all groups, see --data-parallel-size"},
    {"--node-rank --master-addr --master-port --headless",
     "this runs on one host; deploy/systemd and deploy/kubernetes spread it over several"},
    {"--max-parallel-loading-workers", "workers load at the same time, each its own share"},
    {"--disable-custom-all-reduce", "see --collectives for how workers add up"},
    {"--compilation-config --cuda-graph-sizes --cudagraph-capture-sizes "
     "--max-cudagraph-capture-size --attention-backend --attention-config --kernel-config "
     "--optimization-level --model-impl --max-seq-len-to-capture -O -O0 -O1 -O2 -O3",
     "kernels and their recordings are built in and choose themselves"},
    {"--long-prefill-token-threshold --max-num-partial-prefills --max-long-partial-prefills "
     "--scheduler-delay-factor",
     "prompts share what decoding leaves of a step; see --target-itl-ms"},
    {"--enable-log-requests --enable-log-outputs --enable-log-deltas --max-log-len",
     "neither prompts nor answers are ever logged"},
    {"--disable-log-stats --uvicorn-log-level --disable-uvicorn-access-log --log-config-file "
     "--disable-access-log-for-endpoints --log-error-stack",
     "see --log-level and --access-log-file"},
    {"--show-hidden-metrics-for-version --kv-cache-metrics --enable-mfu-metrics",
     "/metrics has all that there are"},
    {"--otlp-traces-endpoint --collect-detailed-traces",
     "traces are not exported; trace ids are in the access log"},
    {"--enable-force-include-usage --return-tokens-as-token-ids", "requests say it for themselves"},
    {"--enable-sleep-mode", "to free the memory, stop the server"},
    {"--task --convert --pooler-config", "these models generate text"},
};

}  // namespace

absl::Span<const NeedlessFlag> NeedlessFlags() { return kNeedlessFlags; }

std::optional<std::string> ReasonToRefuse(absl::string_view flag) {
  for (const RefusedFamily& family : kRefusedFamilies) {
    const std::vector<absl::string_view> names = absl::StrSplit(family.names, ' ');
    if (absl::c_linear_search(names, flag)) return family.reason;
  }
  return std::nullopt;
}

}  // namespace fathom
