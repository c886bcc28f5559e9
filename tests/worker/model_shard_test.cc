#include "worker/model_shard.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/worker/golden.h"
#include "tests/worker/shard_group.h"

namespace fathom {
namespace {

// Float32 against DeepSeek's own float32: both sum in other orders, which measures 2e-6 over these
// models (README of the golden data); 1e-4 is what it grants.
constexpr double kFloat32Tolerance = 1e-4;

std::unique_ptr<ShardGroup> LoadGolden(const std::string& name, const ShardGroupOptions& options) {
  absl::StatusOr<std::unique_ptr<ShardGroup>> group =
      ShardGroup::Load(GoldenCheckpoint(name), options);
  CHECK(group.ok()) << group.status();
  return *std::move(group);
}

constexpr const char* kModels[] = {"v3_tiny", "v3_tiny_noqlora", "v2_tiny_softmax", "v3_tiny_fp8"};
constexpr const char* kPrompts[] = {"p1", "p7", "p64", "p300"};

class GoldenModelTest : public testing::TestWithParam<const char*> {};

TEST_P(GoldenModelTest, LogitsOfEveryTokenEqualDeepSeeks) {
  const Golden golden(absl::StrCat(GetParam(), "/golden.safetensors"));
  const auto group = LoadGolden(GetParam(), {});
  for (const std::string prompt : kPrompts) {
    const auto logits = group->Prompt(golden.Ints(prompt + ".tokens"), 512);
    const double error = RelativeError(logits, golden.Floats(prompt + ".logits"));
    EXPECT_LT(error, kFloat32Tolerance) << prompt;
    std::printf("%s %s %.2e\n", GetParam(), prompt.c_str(), error);
  }
}

INSTANTIATE_TEST_SUITE_P(Models, GoldenModelTest, testing::ValuesIn(kModels),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace fathom
