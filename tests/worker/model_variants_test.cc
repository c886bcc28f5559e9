// Members of the family for which there is no golden data, against members for which there is:
// each variant is a golden checkpoint edited so that the result must be one that is known.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "tests/worker/checkpoint_files.h"
#include "tests/worker/golden.h"
#include "tests/worker/shard_group.h"

namespace fathom {
namespace {

using testing::HasSubstr;

// A checkpoint in memory that can be edited, and run from a temporary folder.
class Variant {
 public:
  explicit Variant(const std::string& golden_name)
      : config_(ReadFile(GoldenCheckpoint(golden_name) + "/config.json")),
        tensors_(ReadCheckpoint(GoldenCheckpoint(golden_name))),
        golden_(golden_name + "/golden.safetensors") {}

  // Replaces the value of a plain field of config.json, or adds the field.
  Variant& Set(const std::string& field, const std::string& value) {
    const std::string name = "\"" + field + "\": ";
    const size_t begin = config_.find(name);
    if (begin == config_.npos) {
      config_.insert(1, name + value + ",");
    } else {
      const size_t end = config_.find_first_of(",\n", begin);
      config_.replace(begin, end - begin, name + value);
    }
    return *this;
  }
  FileTensors& tensors() { return tensors_; }

  absl::StatusOr<std::unique_ptr<ShardGroup>> Load(const ShardGroupOptions& options) const {
    TemporaryDirectory directory;
    WriteCheckpoint(directory.path(), config_, tensors_);
    return ShardGroup::Load(directory.path(), options);
  }
  std::vector<float> Logits(const ShardGroupOptions& options) const {
    const auto group = Load(options);
    CHECK(group.ok()) << group.status();
    return (*group)->Prompt(golden_.Ints("p7.tokens"), 512);
  }
  std::string Refusal() const { return std::string(Load({}).status().message()); }

 private:
  std::string config_;
  FileTensors tensors_;
  Golden golden_;
};

std::string FloatsOfBFloat16(const std::string& bytes) {
  std::string floats(bytes.size() * 2, '\0');
  for (size_t i = 0; i < bytes.size(); i += 2) {
    floats[2 * i + 2] = bytes[i];
    floats[2 * i + 3] = bytes[i + 1];
  }
  return floats;
}

bool IsQuantised(const std::string& name) {
  return name.ends_with("_proj.weight")
             ? !name.ends_with("kv_b_proj.weight") && !name.ends_with("eh_proj.weight")
             : name.ends_with("kv_a_proj_with_mqa.weight");
}

// Every linear layer that the loader would quantise, quantised in the file.
void QuantiseTensors(FileTensors& tensors) {
  const auto device = *OpenCpuDevice({});
  FileTensors factors;
  for (auto& [name, tensor] : tensors) {
    if (!IsQuantised(name)) continue;
    const int64_t rows = tensor.shape[0], columns = tensor.shape[1];
    const int64_t block_rows = (rows + 127) / 128, block_columns = (columns + 127) / 128;
    std::string codes(rows * columns, '\0');
    std::string scale_inv(block_rows * block_columns * 4, '\0');
    device->ops().QuantizeFp8(
        Tensor(tensor.bytes.data(), DType::kBF16, {rows, columns}),
        {.values = Tensor(codes.data(), DType::kF8E4M3, {rows, columns}),
         .scale_inv = Tensor(scale_inv.data(), DType::kF32, {block_rows, block_columns})});
    tensor = {.dtype = "F8_E4M3", .shape = tensor.shape, .bytes = codes};
    factors[name + "_scale_inv"] = {
        .dtype = "F32", .shape = {block_rows, block_columns}, .bytes = scale_inv};
  }
  tensors.merge(factors);
}

TEST(ModelVariantTest, OnTheFlyFp8EqualsACheckpointQuantisedBefore) {
  for (const std::string model : {"v3_tiny", "v3_tiny_noqlora", "v2_tiny_softmax"}) {
    const Variant plain(model);
    Variant quantised(model);
    QuantiseTensors(quantised.tensors());
    quantised.Set("quantization_config",
                  R"({"quant_method": "fp8", "weight_block_size": [128, 128]})");
    ShardGroupOptions on_the_fly;
    on_the_fly.shard.quantization = Quantization::kFp8;
    EXPECT_EQ(plain.Logits(on_the_fly), quantised.Logits({})) << model;
    EXPECT_EQ(quantised.Logits(on_the_fly), quantised.Logits({})) << "F8_E4M3 is left alone";
    EXPECT_LT(RelativeError(quantised.Logits({.world_size = 8}), quantised.Logits({})), 1e-5);
  }
}

TEST(ModelVariantTest, Float32CheckpointsEqualTheirBFloat16Ones) {
  const Variant bfloat16("v3_tiny");
  Variant float32("v3_tiny");
  for (auto& [name, tensor] : float32.tensors()) {
    if (tensor.dtype != "BF16") continue;
    tensor = {.dtype = "F32", .shape = tensor.shape, .bytes = FloatsOfBFloat16(tensor.bytes)};
  }
  EXPECT_LT(RelativeError(float32.Logits({.world_size = 2}), bfloat16.Logits({})), 1e-5);
}

TEST(ModelVariantTest, ATiedHeadIsTheEmbedding) {
  Variant untied("v3_tiny_noqlora");
  untied.tensors()["lm_head.weight"] = untied.tensors()["model.embed_tokens.weight"];
  Variant tied("v3_tiny_noqlora");
  tied.Set("tie_word_embeddings", "true").tensors().erase("lm_head.weight");
  EXPECT_EQ(tied.Logits({}), untied.Logits({}));
  EXPECT_EQ(tied.Logits({.world_size = 4}), untied.Logits({.world_size = 4}));
  tied.Set("tie_word_embeddings", "false");
  EXPECT_THAT(tied.Refusal(), HasSubstr("tensor \"lm_head.weight\" is missing"));
}

TEST(ModelVariantTest, WithoutSharedExpertsOnlyTheRoutedOnesCount) {
  Variant silent("v3_tiny"), absent("v3_tiny");
  absent.Set("n_shared_experts", "0");
  for (auto& [name, tensor] : silent.tensors()) {
    if (name.find("shared_experts.down_proj") != name.npos) {
      tensor.bytes.assign(tensor.bytes.size(), '\0');
    }
  }
  std::erase_if(absent.tensors(), [](const auto& entry) {
    return entry.first.find("shared_experts") != std::string::npos;
  });
  EXPECT_EQ(absent.Logits({}), silent.Logits({}));
  EXPECT_EQ(absent.Logits({.world_size = 2, .enable_expert_parallel = true}),
            silent.Logits({.world_size = 2, .enable_expert_parallel = true}));
}

TEST(ModelVariantTest, ADenseModelIsOneWhoseDenseLayersNeverEnd) {
  Variant dense("v3_tiny_noqlora"), endless("v3_tiny_noqlora");
  for (Variant* variant : {&dense, &endless}) {
    for (const std::string layer : {"gate_proj", "up_proj", "down_proj"}) {
      for (const std::string i : {"1", "2"}) {
        variant->tensors()["model.layers." + i + ".mlp." + layer + ".weight"] =
            variant->tensors()["model.layers.0.mlp." + layer + ".weight"];
      }
    }
  }
  dense.Set("n_routed_experts", "null");
  endless.Set("first_k_dense_replace", "3");
  EXPECT_EQ(dense.Logits({.world_size = 2}), endless.Logits({.world_size = 2}));
}

TEST(ModelVariantTest, MoeLayerFreqSaysWhichLayersHaveExperts) {
  Variant variant("v3_tiny_noqlora");
  variant.Set("moe_layer_freq", "2");
  EXPECT_THAT(variant.Refusal(), HasSubstr("\"model.layers.1.mlp.gate_proj.weight\" is missing"));
}

TEST(ModelVariantTest, GreedyChoiceIsGroupedChoiceThatKeepsEveryGroup) {
  Variant greedy("v2_tiny_softmax"), grouped("v2_tiny_softmax");
  greedy.Set("topk_method", "\"greedy\"").Set("n_group", "1").Set("topk_group", "1");
  grouped.Set("topk_group", "4");
  EXPECT_EQ(greedy.Logits({}), grouped.Logits({}));
}

TEST(ModelVariantTest, ShardsAndASingleFileAreTheSame) {
  const auto sharded = *ShardGroup::Load(GoldenCheckpoint("v3_tiny"), {});
  const Golden golden("v3_tiny/golden.safetensors");
  EXPECT_EQ(Variant("v3_tiny").Logits({}), sharded->Prompt(golden.Ints("p7.tokens"), 512));
}

TEST(ModelVariantTest, TensorsOfNoLayerAreLeftUnread) {
  const Variant plain("v3_tiny_noqlora");
  Variant extended("v3_tiny_noqlora");
  extended.Set("num_nextn_predict_layers", "1");
  extended.tensors()["model.layers.1.self_attn.unheard_of"] = {"I64", {1}, std::string(8, '\1')};
  extended.tensors()["model.layers.3.enorm.weight"] = {"BF16", {1}, std::string(2, '\1')};
  EXPECT_EQ(extended.Logits({}), plain.Logits({}));
}

TEST(ModelVariantTest, LayersThatTheConfigurationDoesNotCountAreRefused) {
  Variant shortened("v3_tiny");  // of four layers and one for multi-token prediction
  shortened.Set("num_hidden_layers", "2");
  EXPECT_THAT(
      shortened.Refusal(),
      HasSubstr("num_hidden_layers is 2 and num_nextn_predict_layers is 1, expected more: tensor "
                "\"model.layers.3."));
  Variant without_prediction("v3_tiny");
  without_prediction.Set("num_nextn_predict_layers", "null");
  EXPECT_THAT(without_prediction.Refusal(),
              HasSubstr("num_hidden_layers is 4 and num_nextn_predict_layers is 0, expected more: "
                        "tensor \"model.layers.4."));
  without_prediction.Set("num_nextn_predict_layers", "2");
  EXPECT_EQ(without_prediction.Logits({}), Variant("v3_tiny").Logits({})) << "they may be absent";
}

TEST(ModelVariantTest, Fp8ThatTheCheckpointDoesNotHoldIsRefused) {
  Variant plain("v3_tiny_noqlora");
  plain.Set("quantization_config", R"({"quant_method": "fp8", "weight_block_size": [128, 128]})");
  EXPECT_THAT(plain.Refusal(), AllOf(HasSubstr("quantization_config.quant_method is \"fp8\""),
                                     HasSubstr("is F8_E4M3")));
}

TEST(ModelVariantTest, AHeadBesideATiedOneIsIgnored) {
  Variant with_head("v3_tiny_noqlora"), without_head("v3_tiny_noqlora");
  with_head.Set("tie_word_embeddings", "true");
  without_head.Set("tie_word_embeddings", "true").tensors().erase("lm_head.weight");
  testing::internal::CaptureStdout();  // where spdlog writes unless a program says otherwise
  const auto logits = with_head.Logits({.world_size = 2});
  EXPECT_THAT(testing::internal::GetCapturedStdout(), HasSubstr("lm_head.weight is ignored"));
  EXPECT_EQ(logits, without_head.Logits({.world_size = 2}));
}

TEST(ModelVariantTest, Fp8WeightsThatTheConfigurationDoesNotAnnounceAreRefused) {
  Variant unannounced("v3_tiny");
  QuantiseTensors(unannounced.tensors());
  EXPECT_THAT(unannounced.Refusal(), HasSubstr("is F8_E4M3[96, 128], expected F32 or BF16"));
}

TEST(ModelVariantTest, MissingFactorsAreRefused) {
  Variant variant("v3_tiny_fp8");
  variant.tensors().erase("model.layers.1.mlp.experts.3.up_proj.weight_scale_inv");
  EXPECT_THAT(variant.Refusal(),
              HasSubstr("\"model.layers.1.mlp.experts.3.up_proj.weight_scale_inv\" is missing, "
                        "expected F32[1, 2]"));
}

TEST(ModelVariantTest, AnExpertOfAnotherTypeIsRefused) {
  Variant variant("v3_tiny_fp8");
  FileTensor& tensor = variant.tensors()["model.layers.1.mlp.experts.2.up_proj.weight"];
  tensor = {"BF16", tensor.shape, tensor.bytes + tensor.bytes};
  EXPECT_THAT(variant.Refusal(),
              HasSubstr("experts.2.up_proj.weight\" is BF16[128, 256], expected F8_E4M3["));
}

TEST(ModelVariantTest, WrongShapesAreRefusedWithWhatWasFoundAndExpected) {
  Variant variant("v3_tiny");
  variant.Set("kv_lora_rank", "32");
  EXPECT_THAT(variant.Refusal(),
              HasSubstr("\"model.layers.0.self_attn.kv_a_proj_with_mqa.weight\" is BF16[80, 128], "
                        "expected F32 or BF16[48, 128]"));
}

}  // namespace
}  // namespace fathom
