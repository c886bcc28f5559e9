#include "worker/model_shard.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "worker/arena.h"
#include "worker/feed_forward.h"
#include "worker/mla_attention.h"
#include "worker/rotary_table.h"
#include "worker/stacked_linear.h"
#include "worker/step_recordings.h"
#include "worker/step_tensors.h"

namespace fathom {
namespace {

constexpr int kMostTokensPerStep = 1 << 20;

// Everything a step writes to, for steps of up to T tokens and L rows of logits.
struct Activations {
  static Activations Plan(const ModelShardOptions& options, const ModelConfig& config,
                          const ShardLayout& layout, Arena& arena);

  Tensor cos_sin;  // [max_model_len, P / 2, 2] f32, written once

  Tensor hidden;        // [T, H] act, the residual stream
  LinearInputs normed;  // [T, H], what a branch reads
  Tensor branch;        // [T, H] act, what a branch adds
  Tensor last_hidden;   // [L, H] act, rows of hidden and branch whose logits are wanted
  Tensor last_branch;   // [L, H] act

  // These three are never in use at once and share their memory.
  MlaScratch attention;
  FeedForwardScratch feed_forward;
  struct Head {
    Tensor part;      // [L, vocab_size / world_size] f32
    Tensor gathered;  // [world_size * L * vocab_size / world_size] f32, rank 0 of several
    Tensor logits;    // [L, vocab_size] f32, rank 0 of several
  } head;
};

Activations Activations::Plan(const ModelShardOptions& options, const ModelConfig& config,
                              const ShardLayout& layout, Arena& arena) {
  const int64_t tokens = options.max_tokens_per_step;
  const int64_t logit_rows = options.max_logit_rows;
  const DType act = options.dtype;
  const bool quantize = options.quantize_activations;
  Activations activations;
  activations.cos_sin =
      arena.Take(DType::kF32, {options.max_model_len, config.qk_rope_head_dim / 2, 2});
  activations.hidden = arena.Take(act, {tokens, config.hidden_size});
  activations.normed = LinearInputs::Plan(act, quantize, tokens, config.hidden_size, arena);
  activations.branch = arena.Take(act, {tokens, config.hidden_size});
  activations.last_hidden = arena.Take(act, {logit_rows, config.hidden_size});
  activations.last_branch = arena.Take(act, {logit_rows, config.hidden_size});

  const int64_t shared = arena.Mark();
  activations.attention = MlaScratch::Plan(config, layout, act, quantize, tokens, arena);
  arena.Rewind(shared);
  activations.feed_forward = FeedForwardScratch::Plan(config, layout, act, quantize, tokens, arena);
  arena.Rewind(shared);
  Head& head = activations.head;
  head.part = arena.Take(DType::kF32, {logit_rows, layout.vocabulary().size()});
  if (layout.rank() == 0 && layout.world_size() > 1) {
    head.gathered = arena.Take(DType::kF32, {logit_rows * config.vocab_size});
    head.logits = arena.Take(DType::kF32, {logit_rows, config.vocab_size});
  }
  return activations;
}

struct DecoderLayer {
  DecoderLayer(int layer, const ModelConfig& config, const ShardLayout& layout)
      : prefix(absl::StrCat("model.layers.", layer, ".")),
        self_attn(absl::StrCat(prefix, "self_attn."), config, layout),
        mlp(absl::StrCat(prefix, "mlp."), layer, config, layout) {}

  void AddWeights(const ModelConfig& config, WeightLoader& loader) {
    loader.AddVector(absl::StrCat(prefix, "input_layernorm.weight"), config.hidden_size,
                     input_layernorm);
    self_attn.AddWeights(loader);
    loader.AddVector(absl::StrCat(prefix, "post_attention_layernorm.weight"), config.hidden_size,
                     post_attention_layernorm);
    mlp.AddWeights(loader);
  }

  const std::string prefix;
  Tensor input_layernorm;
  MlaAttention self_attn;
  Tensor post_attention_layernorm;
  FeedForward mlp;
};

// The weights of a shard, with the names that fill them.
struct ModelWeights {
  ModelWeights(const ModelConfig& config, const ShardLayout& layout) {
    layers.reserve(config.num_hidden_layers);
    for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
      layers.push_back(std::make_unique<DecoderLayer>(layer, config, layout));
    }
  }

  void AddTo(WeightLoader& loader, const ModelConfig& config, const ShardLayout& layout) {
    const MatrixPart vocabulary =
        MatrixPart::Rows(config.vocab_size, config.hidden_size, layout.vocabulary());
    loader.AddTable("model.embed_tokens.weight", vocabulary, embed_tokens);
    for (const auto& layer : layers) layer->AddWeights(config, loader);
    loader.AddVector("model.norm.weight", config.hidden_size, norm);
    if (!config.tie_word_embeddings) loader.AddTable("lm_head.weight", vocabulary, lm_head);
  }

  Tensor embed_tokens;
  std::vector<std::unique_ptr<DecoderLayer>> layers;
  Tensor norm;
  Tensor lm_head;  // absent when tied: embed_tokens serves
};

WeightLoaderOptions LoaderOptions(const ModelShardOptions& options, const ModelConfig& config) {
  return {.dtype = options.dtype,
          .quantization = options.quantization,
          .accept_fp8 = config.fp8_weights};
}

StepTensorsOptions TensorsOptions(const ModelShardOptions& options) {
  return {.max_tokens = options.max_tokens_per_step,
          .max_logit_rows = options.max_logit_rows,
          .max_sequences = options.max_sequences,
          .max_blocks = (options.max_model_len + options.block_size - 1) / options.block_size};
}

StepLimits LimitsOf(const ModelShardOptions& options, const ModelConfig& config,
                    const ShardLayout& layout) {
  const int num_shared = config.HasMoeLayer() ? RoutedExperts::SharedInStack(config, layout) : 0;
  const int64_t heads = layout.heads().size();
  return {.act = options.dtype,
          .kv_cache_dtype = options.kv_cache_dtype,
          .max_tokens = options.max_tokens_per_step,
          .max_sequences = options.max_sequences,
          .max_model_len = options.max_model_len,
          .block_size = options.block_size,
          .num_layers = config.num_hidden_layers,
          .hidden_size = config.hidden_size,
          .heads = heads,
          .qk_nope_head_dim = config.qk_nope_head_dim,
          .qk_rope_head_dim = config.qk_rope_head_dim,
          .kv_lora_rank = config.kv_lora_rank,
          .v_head_dim = config.v_head_dim,
          .n_routed_experts = config.n_routed_experts,
          .num_experts = layout.experts().size() + num_shared,
          .num_choices = config.HasMoeLayer() ? config.routing.num_experts_per_tok + num_shared : 0,
          .widest_linear = std::max<int64_t>(
              {config.hidden_size, config.q_lora_rank + config.kv_dim(),
               heads * config.qk_head_dim(), heads * config.v_head_dim,
               2 * layout.intermediate().size(), 2 * layout.shared_intermediate().size(),
               2 * layout.expert_intermediate().size(), layout.vocabulary().size()})};
}

// Options with defaults filled in, or what is wrong with them.
absl::StatusOr<ModelShardOptions> Resolved(ModelShardOptions options, const ModelConfig& config) {
  CHECK(options.dtype == DType::kF32 || options.dtype == DType::kBF16) << NameOf(options.dtype);
  CHECK_GE(options.block_size, 1);
  if (options.max_model_len == 0) options.max_model_len = config.max_position_embeddings;
  if (options.max_model_len < 1 || options.max_model_len > config.max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat(
        "max_model_len is ", options.max_model_len, ", expected 1 to max_position_embeddings, ",
        config.max_position_embeddings, ": see --max-model-len"));
  }
  if (options.max_tokens_per_step < 1 || options.max_tokens_per_step > kMostTokensPerStep) {
    return absl::InvalidArgumentError(absl::StrCat("max_tokens_per_step is ",
                                                   options.max_tokens_per_step, ", expected 1 to ",
                                                   kMostTokensPerStep));
  }
  if (options.max_logit_rows < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_logit_rows is ", options.max_logit_rows, ", expected at least 1"));
  }
  if (options.max_sequences < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_sequences is ", options.max_sequences, ", expected at least 1"));
  }
  options.max_logit_rows = std::min(options.max_logit_rows, options.max_tokens_per_step);
  options.max_sequences = std::min(options.max_sequences, options.max_tokens_per_step);
  return options;
}

// The layer that a tensor belongs to; -1 for none.
int LayerOf(std::string_view name) {
  constexpr std::string_view kPrefix = "model.layers.";
  if (!name.starts_with(kPrefix)) return -1;
  name.remove_prefix(kPrefix.size());
  int layer = 0;
  return absl::SimpleAtoi(std::string(name.substr(0, name.find('.'))), &layer) ? layer : -1;
}

// Tensors that no rank wants. Those of layers for multi-token prediction and what an old exporter
// leaves are known and not counted.
void WarnOfUnknownTensors(const ModelShardOptions& options, const ModelConfig& config,
                          WeightSource& source) {
  if (source.checkpoint() == nullptr) return;
  const Checkpoint& checkpoint = *source.checkpoint();
  const absl::StatusOr<ShardLayout> whole = ShardLayout::Create({}, config);
  CHECK(whole.ok()) << whole.status();
  ModelWeights weights(config, *whole);
  WeightLoader loader(LoaderOptions(options, config), source);
  weights.AddTo(loader, config, *whole);
  const std::vector<std::string> names = loader.Names();
  const std::set<std::string_view> wanted(names.begin(), names.end());

  int num_unknown = 0;
  std::string example;
  for (const auto& [name, entry] : checkpoint.tensors()) {
    if (wanted.contains(name) || name == "lm_head.weight") continue;
    if (name.ends_with("rotary_emb.inv_freq")) continue;
    if (LayerOf(name) >= config.num_hidden_layers) continue;
    if (num_unknown++ == 0) example = name.substr(0, 200);
  }
  if (config.tie_word_embeddings && checkpoint.Find("lm_head.weight") != nullptr) {
    spdlog::warn("{}: lm_head.weight is ignored: tie_word_embeddings is true in config.json",
                 checkpoint.directory());
  }
  if (num_unknown > 0) {
    spdlog::warn("{}: {} tensors are not part of {} and stay unread, the first is \"{}\"",
                 checkpoint.directory(), num_unknown, config.architecture, example);
  }
}

class LoadedModelShard final : public ModelShard {
 public:
  LoadedModelShard(const ModelShardOptions& options, const ModelConfig& config,
                   const ShardLayout& layout, Device& device)
      : options_(options),
        config_(config),
        layout_(layout),
        device_(device),
        ops_(device.ops()),
        weights_(config, layout),
        step_tensors_(TensorsOptions(options), device),
        recordings_(device) {}

  absl::Status LoadWeights(WeightSource& source, const LoadProgress& progress);
  absl::Status AllocateActivations();

  absl::StatusOr<Tensor> Forward(const StepBatch& batch, KvCache& kv_cache,
                                 Communicator& communicator) override;
  void ForgetRecordings() override { recordings_.Clear(); }

 private:
  void CheckBatch(const StepBatch& batch, const KvCache& kv_cache) const;
  // Queues a step, whose numbers are in step_tensors_, from the embedding to the logits.
  absl::Status QueueStep(const KvCache& kv_cache, Communicator& communicator);
  // The rows of x whose logits the step wants, moved to `out`.
  Tensor Wanted(const Tensor& x, const Tensor& out);
  // Queues the logits of these rows.
  absl::Status QueueHead(const Tensor& normed, Communicator& communicator);
  // Where QueueHead leaves so many rows: on rank 0, in device memory.
  Tensor Logits(int64_t rows, const Communicator& communicator) const;

  const ModelShardOptions options_;
  const ModelConfig config_;
  const ShardLayout layout_;
  Device& device_;
  Ops& ops_;

  ModelWeights weights_;
  std::vector<Buffer> weight_buffers_;
  Activations activations_;
  Buffer activation_buffer_;
  Buffer ops_scratch_;
  StepTensors step_tensors_;
  StepRecordings recordings_;
};

absl::Status LoadedModelShard::LoadWeights(WeightSource& source, const LoadProgress& progress) {
  WeightLoader loader(LoaderOptions(options_, config_), source);
  weights_.AddTo(loader, config_, layout_);
  ASSIGN_OR_RETURN(weight_buffers_, loader.Load(device_, progress));
  if (config_.tie_word_embeddings) weights_.lm_head = weights_.embed_tokens;
  return absl::OkStatus();
}

absl::Status LoadedModelShard::AllocateActivations() {
  Arena counted;
  Activations::Plan(options_, config_, layout_, counted);
  ASSIGN_OR_RETURN(activation_buffer_, device_.Allocate(counted.peak_bytes()));
  Arena placed(activation_buffer_.data());
  activations_ = Activations::Plan(options_, config_, layout_, placed);
  const std::vector<float> table = RotaryTable(config_, options_.max_model_len);
  device_.CopyFromHost(table.data(), activations_.cos_sin);

  const StepLimits limits = LimitsOf(options_, config_, layout_);
  ASSIGN_OR_RETURN(ops_scratch_, device_.Allocate(ops_.ScratchBytes(limits)));
  ops_.UseScratch(limits, ops_scratch_.data());
  return step_tensors_.Allocate();
}

void LoadedModelShard::CheckBatch(const StepBatch& batch, const KvCache& kv_cache) const {
  CHECK(batch.num_tokens() >= 1 && batch.num_tokens() <= options_.max_tokens_per_step)
      << batch.num_tokens() << " tokens";
  CHECK_LE(static_cast<int>(batch.logit_rows.size()), options_.max_logit_rows);
  CHECK_EQ(batch.block_size, kv_cache.options().block_size);
  CHECK_EQ(batch.block_size, options_.block_size);
  CHECK(kv_cache.options().dtype == options_.kv_cache_dtype);
  for (const int32_t position : batch.positions) {
    CHECK(position >= 0 && position < options_.max_model_len) << "position " << position;
  }
}

absl::StatusOr<Tensor> LoadedModelShard::Forward(const StepBatch& batch, KvCache& kv_cache,
                                                 Communicator& communicator) {
  CheckBatch(batch, kv_cache);
  step_tensors_.Set(batch);
  ops_.BeginStep(step_tensors_.attention());

  const auto queue_step = [&] { return QueueStep(kv_cache, communicator); };
  const int64_t rows = step_tensors_.logit_rows().dim(0);
  const bool only_decodes =
      batch.num_tokens() == batch.num_sequences() && rows == batch.num_sequences();
  if (only_decodes && communicator.is_recordable()) {
    RETURN_IF_ERROR(
        recordings_.Run({.num_sequences = batch.num_sequences(),
                         .block_table_width = step_tensors_.attention().block_tables.dim(1)},
                        {kv_cache.id(), communicator.id()}, queue_step));
  } else {
    RETURN_IF_ERROR(queue_step());
  }

  if (rows == 0 || layout_.rank() != 0) return Tensor();
  return Logits(rows, communicator);
}

absl::Status LoadedModelShard::QueueStep(const KvCache& kv_cache, Communicator& communicator) {
  const int64_t tokens = step_tensors_.token_ids().dim(0);
  const int64_t wanted = step_tensors_.logit_rows().dim(0);
  const AttentionStep step = {.positions = step_tensors_.positions(),
                              .places = step_tensors_.places(),
                              .cos_sin = activations_.cos_sin,
                              .batch = step_tensors_.attention()};
  Tensor hidden = activations_.hidden.Slice(0, 0, tokens);
  LinearInputs normed = activations_.normed.Rows(tokens);
  Tensor branch = activations_.branch.Slice(0, 0, tokens);
  const float eps = config_.rms_norm_eps;
  // hidden += Σ branch over ranks, normed for whoever reads it in these forms.
  const auto add_branch_and_norm = [&](const Tensor& weight, const InputForms& forms) {
    return communicator.AllReduceAddRmsNorm(ops_, branch, hidden, weight, eps,
                                            forms.plain ? normed.plain.values : Tensor(),
                                            forms.quantized ? normed.quantized : LinearInput());
  };

  // Each rank embeds the tokens of its vocabulary rows.
  ops_.Embed(step_tensors_.token_ids(), weights_.embed_tokens,
             static_cast<int>(layout_.vocabulary().begin), hidden);
  RETURN_IF_ERROR(communicator.AllReduceSum(hidden));

  for (int i = 0; i < config_.num_hidden_layers; ++i) {
    const DecoderLayer& layer = *weights_.layers[i];
    const InputForms attention_forms = layer.self_attn.FormsOf(normed);
    if (i == 0) {
      ops_.AddRmsNorm(hidden, {}, layer.input_layernorm, eps,
                      attention_forms.plain ? normed.plain.values : Tensor(),
                      attention_forms.quantized ? normed.quantized : LinearInput());
    } else {
      RETURN_IF_ERROR(add_branch_and_norm(layer.input_layernorm, attention_forms));
    }
    layer.self_attn.Forward(normed, step, kv_cache.layer(i), activations_.attention, ops_, branch);

    if (i + 1 == config_.num_hidden_layers && wanted < tokens) {
      // No later token looks at the others any more.
      if (wanted == 0) break;
      hidden = Wanted(hidden, activations_.last_hidden);
      branch = Wanted(branch, activations_.last_branch);
      normed = normed.Rows(wanted);
    }
    RETURN_IF_ERROR(add_branch_and_norm(layer.post_attention_layernorm, layer.mlp.FormsOf(normed)));
    layer.mlp.Forward(normed, activations_.feed_forward, ops_, branch);
  }
  if (wanted > 0) {
    RETURN_IF_ERROR(add_branch_and_norm(weights_.norm, {.plain = true}));
    RETURN_IF_ERROR(QueueHead(normed.plain.values, communicator));
  }
  return absl::OkStatus();
}

Tensor LoadedModelShard::Wanted(const Tensor& x, const Tensor& out) {
  const Tensor rows = out.Slice(0, 0, step_tensors_.logit_rows().dim(0));
  ops_.GatherRows(x, step_tensors_.logit_rows(), rows);
  return rows;
}

absl::Status LoadedModelShard::QueueHead(const Tensor& normed, Communicator& communicator) {
  const int64_t rows = step_tensors_.logit_rows().dim(0);
  const Activations::Head& head = activations_.head;
  const Tensor part = head.part.Slice(0, 0, rows);
  ops_.Linear(normed, {.values = weights_.lm_head}, part);
  if (communicator.world_size() == 1) return absl::OkStatus();
  if (layout_.rank() != 0) return communicator.GatherToRank0(part, Tensor());

  // [world, L, part of vocabulary] becomes [L, vocabulary].
  const int64_t world = layout_.world_size(), part_size = layout_.vocabulary().size();
  const Tensor gathered =
      head.gathered.Slice(0, 0, world * rows * part_size).Reshape({world, rows, part_size});
  RETURN_IF_ERROR(communicator.GatherToRank0(part, gathered));
  const Tensor logits = Logits(rows, communicator);
  for (int64_t rank = 0; rank < world; ++rank) {
    device_.Copy(gathered[rank], logits.Slice(1, rank * part_size, (rank + 1) * part_size));
  }
  return absl::OkStatus();
}

Tensor LoadedModelShard::Logits(int64_t rows, const Communicator& communicator) const {
  const Activations::Head& head = activations_.head;
  return (communicator.world_size() == 1 ? head.part : head.logits).Slice(0, 0, rows);
}

}  // namespace

absl::Status ModelShard::CheckAgreement(const ModelConfig& config, const Checkpoint& checkpoint) {
  const int num_layers = config.num_hidden_layers + config.num_nextn_predict_layers;
  bool has_fp8 = false;
  for (const auto& [name, entry] : checkpoint.tensors()) {
    has_fp8 = has_fp8 || entry.info->dtype == NameOf(DType::kF8E4M3);
    if (LayerOf(name) >= num_layers) {
      return absl::InvalidArgumentError(
          absl::StrCat("config.json: num_hidden_layers is ", config.num_hidden_layers,
                       " and num_nextn_predict_layers is ", config.num_nextn_predict_layers,
                       ", expected more: tensor \"", absl::CEscape(name.substr(0, 200)), "\" of ",
                       entry.file->path(), " is of layer ", LayerOf(name)));
    }
  }
  if (config.fp8_weights && !has_fp8) {
    return absl::InvalidArgumentError(
        absl::StrCat("config.json: quantization_config.quant_method is \"fp8\", expected no "
                     "quantization_config: no tensor of ",
                     checkpoint.directory(), " is ", NameOf(DType::kF8E4M3)));
  }
  return absl::OkStatus();
}

absl::StatusOr<ModelShard::Footprint> ModelShard::Plan(const ModelShardOptions& options,
                                                       const ModelConfig& config,
                                                       const ShardLayout& layout,
                                                       WeightSource& source, Device& device) {
  ASSIGN_OR_RETURN(const ModelShardOptions resolved, Resolved(options, config));
  ModelWeights weights(config, layout);
  WeightLoader loader(LoaderOptions(resolved, config), source);
  weights.AddTo(loader, config, layout);
  ASSIGN_OR_RETURN(const WeightLoader::Footprint planned, loader.Plan());
  Arena counted;
  Activations::Plan(resolved, config, layout, counted);
  return Footprint{
      .weight_bytes = planned.weight_bytes,
      .activation_bytes = counted.peak_bytes() +
                          device.ops().ScratchBytes(LimitsOf(resolved, config, layout)) +
                          StepTensors::MemoryBytes(TensorsOptions(resolved), device)};
}

absl::StatusOr<std::unique_ptr<ModelShard>> ModelShard::Load(const ModelShardOptions& options,
                                                             const ModelConfig& config,
                                                             const ShardLayout& layout,
                                                             WeightSource& source, Device& device,
                                                             const LoadProgress& progress) {
  ASSIGN_OR_RETURN(const ModelShardOptions resolved, Resolved(options, config));
  if (layout.rank() == 0) WarnOfUnknownTensors(resolved, config, source);
  auto shard = std::make_unique<LoadedModelShard>(resolved, config, layout, device);
  RETURN_IF_ERROR(shard->LoadWeights(source, progress));
  RETURN_IF_ERROR(shard->AllocateActivations());
  return std::unique_ptr<ModelShard>(std::move(shard));
}

}  // namespace fathom
