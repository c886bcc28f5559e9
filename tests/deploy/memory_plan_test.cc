#include "deploy/launcher/memory_plan.h"

#include <filesystem>
#include <fstream>
#include <string>

#include "base/human_bytes.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kPlan[] =
    R"({"architecture":"DeepseekV3ForCausalLM","vocab_size":129280,"max_position_embeddings":163840,)"
    R"("world_size":8,"dtype":"float32","kv_cache_dtype":"bfloat16","quantization":"fp8","activation_quantization":"fp8",)"
    R"("budget_bytes":34359738368,"weight_bytes":17179869184,"activation_bytes":104857600,)"
    R"("kv_block_bytes":20480,"kv_block_capacity":90000,"num_kv_blocks":71840,)"
    R"("max_model_len":32768})"
    "\n";

// A model folder with this config.json.
std::string ModelWithConfig(const std::string& config) {
  const std::string dir = ::testing::TempDir() + "/model_with_config";
  std::filesystem::create_directories(dir);
  std::ofstream(dir + "/config.json") << config;
  return dir;
}

TEST(MemoryPlanTest, IsReadFromTheWorkersLineAndToldInKnownWords) {
  const absl::StatusOr<MemoryPlan> plan = ParseMemoryPlan(kPlan);
  ASSERT_TRUE(plan.ok()) << plan.status();
  ServeOptions options;
  options.tensor_parallel_size = 8;
  options.enable_expert_parallel = true;
  const std::vector<std::string> lines = DescribeMemoryPlan(*plan, options);
  EXPECT_THAT(lines, Contains("KV cache size: 1,149,440 tokens"));
  EXPECT_THAT(lines, Contains("Maximum concurrency for 32,768 tokens per request: 35.08x"));
  EXPECT_THAT(lines, Contains("Workers: 8 on cpu, expert parallel"));
  EXPECT_THAT(lines, Contains(HasSubstr("16.0 GiB weights + 100 MiB activations + 1.4 GiB KV")));
  EXPECT_THAT(lines, Contains(HasSubstr("Block size: 16 tokens per KV block (the default")));
}

TEST(MemoryPlanTest, SaysHowManyGroupsThereAre) {
  ServeOptions options;
  options.tensor_parallel_size = 4;
  options.data_parallel_size = 2;
  EXPECT_THAT(DescribeMemoryPlan(*ParseMemoryPlan(kPlan), options),
              Contains(HasSubstr("Workers: 8 on cpu in 2 groups of 4")));
}

TEST(MemoryPlanTest, ASimulationHasNoMemoryToTellOf) {
  ServeOptions options;
  options.device = "sim";
  options.sim_profile = "h200.json";
  const auto lines = DescribeMemoryPlan(*ParseMemoryPlan(kPlan), options);
  EXPECT_THAT(lines, Contains(HasSubstr("steps take the time that h200.json says")));
  EXPECT_THAT(lines, Not(Contains(HasSubstr("Memory of each worker"))));
  EXPECT_THAT(lines, Contains("KV cache size: 1,149,440 tokens"));
}

TEST(MemoryPlanTest, SaysWhyABlockSizeIsInForce) {
  const MemoryPlan plan = *ParseMemoryPlan(kPlan);
  ServeOptions options;
  options.block_size = 64;
  EXPECT_THAT(DescribeMemoryPlan(plan, options),
              Contains(HasSubstr("Block size: 64 tokens per KV block (as --block-size asks")));
}

TEST(MemoryPlanTest, SaysWhenQuantizingChangesNothing) {
  const MemoryPlan plan = *ParseMemoryPlan(kPlan);
  ServeOptions options;
  options.quantization = "fp8";
  options.model_dir = ModelWithConfig(R"({"quantization_config": {"quant_method": "fp8"}})");
  EXPECT_THAT(DescribeMemoryPlan(plan, options), Contains(HasSubstr("fp8 changes nothing")));
  options.model_dir = ModelWithConfig("{}");
  EXPECT_THAT(DescribeMemoryPlan(plan, options), Not(Contains(HasSubstr("changes nothing"))));
}

TEST(MemoryPlanTest, RefusesWhatIsNoPlan) {
  EXPECT_FALSE(ParseMemoryPlan("").ok());
  EXPECT_FALSE(ParseMemoryPlan("Segmentation fault").ok());
  EXPECT_FALSE(ParseMemoryPlan("[]").ok());
  std::string without_blocks = kPlan;
  without_blocks.replace(without_blocks.find("num_kv_blocks"), 3, "the");
  EXPECT_THAT(std::string(ParseMemoryPlan(without_blocks).status().message()),
              HasSubstr("no number 'num_kv_blocks'"));
}

TEST(MemoryPlanTest, WritesNumbersForPeople) {
  EXPECT_EQ(WithThousands(0), "0");
  EXPECT_EQ(WithThousands(999), "999");
  EXPECT_EQ(WithThousands(1000), "1,000");
  EXPECT_EQ(WithThousands(1234567), "1,234,567");
  EXPECT_EQ(HumanBytes(1), "1 B");
  EXPECT_EQ(HumanBytes(1536), "1.5 KiB");
  EXPECT_EQ(HumanBytes(312 << 20), "312 MiB");
  EXPECT_EQ(HumanBytes(int64_t{80} << 30), "80.0 GiB");
}

}  // namespace
}  // namespace fathom
