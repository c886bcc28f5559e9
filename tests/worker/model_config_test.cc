#include "worker/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "tests/worker/checkpoint_files.h"
#include "tests/worker/golden.h"

namespace fathom {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr char kYarn[] =
    R"({"type":"yarn","factor":40,"original_max_position_embeddings":4096,"beta_fast":32,)"
    R"("beta_slow":1,"mscale":1.0,"mscale_all_dim":1.0})";
constexpr char kFp8[] = R"({"activation_scheme":"dynamic","fmt":"e4m3","quant_method":"fp8",)"
                        R"("weight_block_size":[128,128]})";

// Fields of config.json by name, as JSON. An edit with an empty value removes the field.
using Fields = std::map<std::string, std::string>;

Fields DeepSeekV3() {
  return {{"architectures", R"(["DeepseekV3ForCausalLM"])"},
          {"attention_bias", "false"},
          {"eos_token_id", "1"},
          {"first_k_dense_replace", "3"},
          {"hidden_act", R"("silu")"},
          {"hidden_size", "7168"},
          {"intermediate_size", "18432"},
          {"kv_lora_rank", "512"},
          {"max_position_embeddings", "163840"},
          {"moe_intermediate_size", "2048"},
          {"moe_layer_freq", "1"},
          {"n_group", "8"},
          {"n_routed_experts", "256"},
          {"n_shared_experts", "1"},
          {"norm_topk_prob", "true"},
          {"num_attention_heads", "128"},
          {"num_experts_per_tok", "8"},
          {"num_hidden_layers", "61"},
          {"num_key_value_heads", "128"},
          {"num_nextn_predict_layers", "1"},
          {"q_lora_rank", "1536"},
          {"qk_nope_head_dim", "128"},
          {"qk_rope_head_dim", "64"},
          {"quantization_config", kFp8},
          {"rms_norm_eps", "1e-06"},
          {"rope_scaling", kYarn},
          {"rope_theta", "10000"},
          {"routed_scaling_factor", "2.5"},
          {"scoring_func", R"("sigmoid")"},
          {"tie_word_embeddings", "false"},
          {"topk_group", "4"},
          {"topk_method", R"("noaux_tc")"},
          {"torch_dtype", R"("bfloat16")"},
          {"v_head_dim", "128"},
          {"vocab_size", "129280"}};
}

std::string Json(const Fields& fields) {
  std::vector<std::string> entries;
  for (const auto& [name, value] : fields) {
    if (!value.empty()) entries.push_back(absl::StrCat("\"", name, "\":", value));
  }
  return absl::StrCat("{", absl::StrJoin(entries, ","), "}");
}

std::string Edited(const Fields& edits) {
  Fields fields = DeepSeekV3();
  for (const auto& [name, value] : edits) fields[name] = value;
  return Json(fields);
}

ModelConfig Parsed(const Fields& edits, const std::string& generation_config = "") {
  const auto config = ParseModelConfig(Edited(edits), generation_config);
  CHECK(config.ok()) << config.status();
  return *config;
}

TEST(ModelConfigTest, ReadsDeepSeekV3) {
  const ModelConfig config = Parsed({});
  EXPECT_EQ(config.architecture, "DeepseekV3ForCausalLM");
  EXPECT_EQ(config.vocab_size, 129280);
  EXPECT_EQ(config.qk_head_dim(), 192);
  EXPECT_EQ(config.kv_dim(), 576);
  EXPECT_EQ(config.num_hidden_layers, 61);
  EXPECT_EQ(config.num_nextn_predict_layers, 1);
  EXPECT_EQ(config.routing.num_experts_per_tok, 8);
  EXPECT_EQ(config.routing.n_group, 8);
  EXPECT_EQ(config.routing.topk_group, 4);
  EXPECT_EQ(config.routing.topk_method, TopkMethod::kNoauxTc);
  EXPECT_EQ(config.routing.scoring_func, ScoringFunc::kSigmoid);
  EXPECT_TRUE(config.routing.norm_topk_prob);
  EXPECT_EQ(config.routing.routed_scaling_factor, 2.5f);
  EXPECT_TRUE(config.fp8_weights);
  EXPECT_EQ(config.yarn->factor, 40.0);
  EXPECT_NEAR(config.SoftmaxScale(), 0.13523378, 1e-8);
  EXPECT_FALSE(config.IsMoeLayer(2));
  EXPECT_TRUE(config.IsMoeLayer(3));
  EXPECT_TRUE(config.HasDenseLayer());
}

TEST(ModelConfigTest, ReadsTheGoldenModels) {
  const ModelConfig v2 = *ReadModelConfig(GoldenCheckpoint("v2_tiny_softmax"));
  EXPECT_EQ(v2.architecture, "DeepseekV2ForCausalLM");
  EXPECT_EQ(v2.routing.topk_method, TopkMethod::kGroupLimitedGreedy);
  EXPECT_EQ(v2.routing.scoring_func, ScoringFunc::kSoftmax);
  EXPECT_FALSE(v2.routing.norm_topk_prob);
  EXPECT_EQ(v2.yarn->mscale_all_dim, 0.707);

  const ModelConfig moonlight = *ReadModelConfig(GoldenCheckpoint("v3_tiny_noqlora"));
  EXPECT_EQ(moonlight.q_lora_rank, 0);
  EXPECT_EQ(moonlight.n_shared_experts, 2);
  EXPECT_FALSE(moonlight.yarn.has_value());
  EXPECT_EQ(moonlight.rope_theta, 50000.0);
  EXPECT_FALSE(moonlight.fp8_weights);
}

TEST(ModelConfigTest, AbsentFieldsMeanWhatTheModellingCodeMeans) {
  const ModelConfig v3 = Parsed({{"topk_method", ""},
                                 {"scoring_func", ""},
                                 {"norm_topk_prob", ""},
                                 {"rope_scaling", "null"},
                                 {"q_lora_rank", "null"},
                                 {"num_key_value_heads", ""},
                                 {"eos_token_id", "null"},
                                 {"quantization_config", "null"},
                                 {"hidden_act", ""}});
  EXPECT_EQ(v3.routing.topk_method, TopkMethod::kNoauxTc);
  EXPECT_EQ(v3.routing.scoring_func, ScoringFunc::kSigmoid);
  EXPECT_TRUE(v3.routing.norm_topk_prob);
  EXPECT_TRUE(v3.eos_token_ids.empty());
  EXPECT_FALSE(v3.fp8_weights);

  const ModelConfig v2 = Parsed({{"architectures", R"(["DeepseekV2ForCausalLM"])"},
                                 {"topk_method", ""},
                                 {"scoring_func", ""},
                                 {"norm_topk_prob", ""},
                                 {"n_group", "null"},
                                 {"topk_group", "null"}});
  EXPECT_EQ(v2.routing.topk_method, TopkMethod::kGreedy);
  EXPECT_EQ(v2.routing.scoring_func, ScoringFunc::kSoftmax);
  EXPECT_FALSE(v2.routing.norm_topk_prob);
}

TEST(ModelConfigTest, ModelTypeNamesTheFamilyOrIsAbsent) {
  for (const char* model_type : {"", "null", R"("deepseek_v3")", R"("kimi_k2")"}) {
    EXPECT_TRUE(ParseModelConfig(Edited({{"model_type", model_type}}), "").ok()) << model_type;
  }
}

TEST(ModelConfigTest, WithoutRoutedExpertsEveryLayerIsDense) {
  const ModelConfig config = Parsed({{"n_routed_experts", ""},
                                     {"n_shared_experts", ""},
                                     {"moe_intermediate_size", ""},
                                     {"num_experts_per_tok", ""}});
  EXPECT_FALSE(config.HasMoeLayer());
}

TEST(ModelConfigTest, NewerNamesOfRotaryFieldsAreUnderstood) {
  std::string yarn = kYarn;
  yarn.replace(yarn.find("\"type\""), 6, "\"rope_theta\":50000,\"rope_type\"");
  const ModelConfig config =
      Parsed({{"rope_scaling", ""}, {"rope_theta", ""}, {"rope_parameters", yarn}});
  EXPECT_EQ(config.yarn->factor, 40.0);
  EXPECT_EQ(config.rope_theta, 50000.0);
  EXPECT_FALSE(Parsed({{"rope_scaling", R"({"rope_type":"default"})"}}).yarn.has_value());
}

TEST(ModelConfigTest, EndTokensComeFromBothFiles) {
  EXPECT_THAT(Parsed({{"eos_token_id", "[3, 1]"}}).eos_token_ids, ElementsAre(1, 3));
  EXPECT_THAT(Parsed({}, R"({"eos_token_id": [7, 1], "temperature": 0.6})").eos_token_ids,
              ElementsAre(1, 7));
  EXPECT_THAT(Parsed({}, R"({"eos_token_id": 5})").eos_token_ids, ElementsAre(1, 5));
  EXPECT_THAT(Parsed({}, "{}").eos_token_ids, ElementsAre(1));
}

struct Hostile {
  const char* name;
  Fields edits;
  const char* refusal;
};

const std::vector<Hostile>& HostileConfigs() {
  static const auto& configs = *new std::vector<Hostile>{
      {"no_architecture", {{"architectures", ""}}, "architectures is missing, expected"},
      {"other_architecture",
       {{"architectures", R"(["LlamaForCausalLM"])"}},
       R"(architectures is ["LlamaForCausalLM"], expected ["DeepseekV3ForCausalLM"])"},
      {"two_architectures",
       {{"architectures", R"(["DeepseekV3ForCausalLM","DeepseekV2ForCausalLM"])"}},
       "architectures is ["},
      {"v32",
       {{"architectures", R"(["DeepseekV32ForCausalLM"])"}},
       "sparse attention is not supported yet"},
      {"llama_that_claims_to_be_v3",
       {{"model_type", R"("llama")"}},
       R"(model_type is "llama", expected "deepseek_v3" or "kimi_k2" beside architecture )"
       "DeepseekV3ForCausalLM"},
      {"v2_that_claims_to_be_v3",
       {{"model_type", R"("deepseek_v2")"}},
       R"(model_type is "deepseek_v2", expected "deepseek_v3")"},
      {"v3_that_claims_to_be_v2",
       {{"architectures", R"(["DeepseekV2ForCausalLM"])"}, {"model_type", R"("deepseek_v3")"}},
       R"(model_type is "deepseek_v3", expected "deepseek_v2" beside architecture Deepseek)"},
      {"model_type_number", {{"model_type", "3"}}, "model_type is 3, expected a string"},
      {"model_type_empty", {{"model_type", R"("")"}}, R"(model_type is "", expected)"},
      {"negative_prediction_layers",
       {{"num_nextn_predict_layers", "-1"}},
       "num_nextn_predict_layers is -1, expected an integer from 0"},
      {"sparse_attention_in_v3", {{"index_topk", "2048"}}, "index_topk is 2048, expected null"},
      {"gelu", {{"hidden_act", R"("gelu")"}}, R"(hidden_act is "gelu", expected "silu")"},
      {"attention_bias", {{"attention_bias", "true"}}, "attention_bias is true, expected false"},
      {"halves", {{"rope_interleave", "false"}}, "rope_interleave is false, expected true"},
      {"no_vocabulary", {{"vocab_size", ""}}, "vocab_size is missing, expected an integer from 1"},
      {"vocab_size_0", {{"vocab_size", "0"}}, "vocab_size is 0, expected"},
      {"vocab_size_negative", {{"vocab_size", "-5"}}, "vocab_size is -5, expected"},
      {"vocab_size_text", {{"vocab_size", R"("big")"}}, R"(vocab_size is "big", expected)"},
      {"vocab_size_fraction", {{"vocab_size", "1000.5"}}, "vocab_size is 1000.5, expected"},
      {"vocab_size_huge",
       {{"vocab_size", "9000000000000000000"}},
       "vocab_size is 9000000000000000000"},
      {"hidden_size_beyond_64_bits",
       {{"hidden_size", "18446744073709551615"}},
       "hidden_size is 18446744073709551615"},
      {"hidden_size_1e300", {{"hidden_size", "1e300"}}, "hidden_size is 1e"},
      {"layers_huge", {{"num_hidden_layers", "1000000"}}, "num_hidden_layers is 1000000"},
      {"heads_0", {{"num_attention_heads", "0"}}, "num_attention_heads is 0"},
      {"fewer_kv_heads",
       {{"num_key_value_heads", "8"}},
       "num_key_value_heads is 8, expected num_attention_heads, 128"},
      {"odd_rope", {{"qk_rope_head_dim", "63"}}, "qk_rope_head_dim is 63, expected an even number"},
      {"q_lora_rank_0", {{"q_lora_rank", "0"}}, "q_lora_rank is 0"},
      {"kv_lora_rank_list", {{"kv_lora_rank", "[512]"}}, "kv_lora_rank is [512]"},
      {"positions_0", {{"max_position_embeddings", "0"}}, "max_position_embeddings is 0"},
      {"experts_without_end",
       {{"num_hidden_layers", "4096"}, {"n_routed_experts", "4096"}},
       "n_routed_experts is 4096, expected at most 262144 over all of 4096 layers"},
      {"groups_do_not_divide",
       {{"n_group", "7"}},
       "n_group is 7, expected a divisor of n_routed_experts, 256"},
      {"topk_group_above_n_group",
       {{"topk_group", "9"}},
       "topk_group is 9, expected at most n_group, 8"},
      {"too_many_experts_per_token",
       {{"num_experts_per_tok", "129"}},
       "num_experts_per_tok is 129, expected at most 128, the experts in 4 of 8 groups"},
      {"no_experts_per_token", {{"num_experts_per_tok", "0"}}, "num_experts_per_tok is 0"},
      {"no_expert_width", {{"moe_intermediate_size", ""}}, "moe_intermediate_size is missing"},
      {"groups_of_one", {{"n_group", "256"}}, "n_group is 256, expected groups of two experts"},
      {"greedy_in_groups", {{"topk_method", R"("greedy")"}}, "n_group is 8, expected 1"},
      {"other_topk_method", {{"topk_method", R"("hash")"}}, R"(topk_method is "hash", expected)"},
      {"other_scoring", {{"scoring_func", R"("relu")"}}, R"(scoring_func is "relu", expected)"},
      {"negative_scale", {{"routed_scaling_factor", "-1"}}, "routed_scaling_factor is -1"},
      {"moe_layer_freq_0", {{"moe_layer_freq", "0"}}, "moe_layer_freq is 0"},
      {"negative_dense_layers", {{"first_k_dense_replace", "-1"}}, "first_k_dense_replace is -1"},
      {"linear_rope",
       {{"rope_scaling", R"({"type":"linear","factor":2})"}},
       R"(rope_scaling.type is "linear", expected "yarn")"},
      {"untyped_rope", {{"rope_scaling", R"({"factor":2})"}}, "rope_scaling.rope_type is missing"},
      {"rope_is_a_number", {{"rope_scaling", "40"}}, "rope_scaling is 40, expected an object"},
      {"rope_of_two_minds",
       {{"rope_scaling", R"({"type":"yarn","rope_type":"linear"})"}},
       "rope_scaling.rope_type is \"linear\", expected the same as type"},
      {"rope_twice", {{"rope_parameters", kYarn}}, "rope_parameters is {"},
      {"yarn_without_factor",
       {{"rope_scaling", R"({"type":"yarn","original_max_position_embeddings":4096})"}},
       "rope_scaling.factor is missing"},
      {"yarn_factor_0",
       {{"rope_scaling", R"({"type":"yarn","factor":0,"original_max_position_embeddings":4096})"}},
       "rope_scaling.factor is 0"},
      {"yarn_without_context",
       {{"rope_scaling", R"({"type":"yarn","factor":40})"}},
       "rope_scaling.original_max_position_embeddings is missing"},
      {"yarn_with_a_surprise",
       {{"rope_scaling",
         R"({"type":"yarn","factor":40,"original_max_position_embeddings":9,"truncate":false})"}},
       "rope_scaling.truncate is false, expected no such field"},
      {"yarn_betas_crossed",
       {{"rope_scaling",
         R"({"type":"yarn","factor":40,"original_max_position_embeddings":9,"beta_fast":0.5})"}},
       "rope_scaling.beta_fast is 0.5, expected at least beta_slow"},
      {"rope_theta_1", {{"rope_theta", "1"}}, "rope_theta is 1"},
      {"rope_theta_text", {{"rope_theta", R"("10000")"}}, R"(rope_theta is "10000")"},
      {"eps_0", {{"rms_norm_eps", "0"}}, "rms_norm_eps is 0"},
      {"int8",
       {{"quantization_config", R"({"quant_method":"int8"})"}},
       R"(quantization_config.quant_method is "int8", expected "fp8")"},
      {"fp8_e5m2",
       {{"quantization_config",
         R"({"quant_method":"fp8","fmt":"e5m2","weight_block_size":[128,128]})"}},
       R"(quantization_config.fmt is "e5m2")"},
      {"fp8_static",
       {{"quantization_config",
         R"({"quant_method":"fp8","activation_scheme":"static","weight_block_size":[128,128]})"}},
       R"(activation_scheme is "static")"},
      {"fp8_other_blocks",
       {{"quantization_config", R"({"quant_method":"fp8","weight_block_size":[64,64]})"}},
       "weight_block_size is [64,64], expected [128,128]"},
      {"fp8_without_blocks",
       {{"quantization_config", R"({"quant_method":"fp8"})"}},
       "weight_block_size is missing"},
      {"fp8_with_a_surprise",
       {{"quantization_config",
         R"({"quant_method":"fp8","weight_block_size":[128,128],"kv_cache_scheme":"x"})"}},
       "kv_cache_scheme is \"x\", expected no such field"},
      {"tied_perhaps",
       {{"tie_word_embeddings", R"("maybe")"}},
       R"(tie_word_embeddings is "maybe")"},
      {"eos_past_the_vocabulary",
       {{"eos_token_id", "129280"}},
       "eos_token_id is 129280, expected an id from 0 to 129279"},
      {"eos_negative", {{"eos_token_id", "[1,-1]"}}, "eos_token_id is [1,-1]"},
      {"eos_text", {{"eos_token_id", R"("</s>")"}}, R"(eos_token_id is "</s>")"},
  };
  return configs;
}

class HostileConfigTest : public testing::TestWithParam<Hostile> {};

TEST_P(HostileConfigTest, IsRefusedWithFieldValueAndExpectation) {
  const auto config = ParseModelConfig(Edited(GetParam().edits), "");
  ASSERT_FALSE(config.ok());
  EXPECT_TRUE(absl::IsInvalidArgument(config.status()));
  EXPECT_THAT(std::string(config.status().message()), HasSubstr(GetParam().refusal));
  EXPECT_THAT(std::string(config.status().message()), HasSubstr("config.json: "));
}

INSTANTIATE_TEST_SUITE_P(Configs, HostileConfigTest, testing::ValuesIn(HostileConfigs()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(HostileConfigTextTest, WhatIsNoObjectOfJsonIsRefused) {
  const auto refusal = [](const std::string& text, const std::string& generation = "") {
    return std::string(ParseModelConfig(text, generation).status().message());
  };
  EXPECT_THAT(refusal(""), HasSubstr("config.json: not valid JSON"));
  EXPECT_THAT(refusal("{"), HasSubstr("config.json: not valid JSON"));
  EXPECT_THAT(refusal(std::string(100'000, '[')), HasSubstr("config.json: not valid JSON"));
  EXPECT_THAT(refusal("[]"), HasSubstr("expected an object"));
  EXPECT_THAT(refusal(R"({"vocab_size":1,"vocab_size":2})"), HasSubstr("vocab_size occurs twice"));
  EXPECT_THAT(refusal(Edited({}), "[1"), HasSubstr("generation_config.json: not valid JSON"));
  EXPECT_THAT(refusal(Edited({}), R"({"eos_token_id":999999})"),
              HasSubstr("generation_config.json: eos_token_id is 999999"));
  EXPECT_THAT(refusal(Edited({{"eos_token_id", "[" + std::string(200, '1') + "]"}})),
              HasSubstr("config.json: "));
}

TEST(ModelConfigTest, AFolderWithoutConfigurationIsNotFound) {
  TemporaryDirectory directory;
  const auto config = ReadModelConfig(directory.path());
  EXPECT_TRUE(absl::IsNotFound(config.status())) << config.status();
  WriteFile(directory.File("config.json"), Edited({}));
  EXPECT_TRUE(ReadModelConfig(directory.path()).ok());
  WriteFile(directory.File("generation_config.json"), R"({"eos_token_id":[9]})");
  EXPECT_THAT(ReadModelConfig(directory.path())->eos_token_ids, ElementsAre(1, 9));
}

}  // namespace
}  // namespace fathom
