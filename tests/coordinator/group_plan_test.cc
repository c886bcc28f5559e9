#include "coordinator/group_plan.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;

class GroupPlanTest : public ::testing::Test {
 protected:
  GroupPlanTest() : descriptions_(3), addresses_{"unix:/w0", "unix:/w1", "unix:/w2"} {
    options_.version = "1.0";
    options_.max_sequences = 4;
    for (v1::DescribeResponse& description : descriptions_) {
      description.set_version("1.0");
      description.set_model_fingerprint("abc");
      description.set_architecture("DeepseekV3ForCausalLM");
      description.set_vocab_size(1000);
      description.set_max_position_embeddings(1024);
      description.add_eos_token_ids(1);
      description.set_dtype("float32");
      description.set_kv_cache_dtype("float32");
      description.set_quantization("none");
      description.set_activation_quantization("none");
      description.mutable_plan()->set_kv_block_capacity(100);
      description.mutable_plan()->set_weight_bytes(3);
      description.mutable_plan()->set_budget_bytes(4);
    }
  }

  absl::StatusOr<GroupPlan> Plan() const { return PlanGroup(options_, descriptions_, addresses_); }

  void ExpectRefused(const std::vector<std::string>& parts) const {
    const absl::Status status = Plan().status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    for (const std::string& part : parts) {
      EXPECT_THAT(std::string(status.message()), HasSubstr(part));
    }
  }

  GroupPlanOptions options_;
  std::vector<v1::DescribeResponse> descriptions_;
  std::vector<std::string> addresses_;
};

TEST_F(GroupPlanTest, HasTheBlocksOfTheWorkerWithTheLeastRoom) {
  descriptions_[1].mutable_plan()->set_kv_block_capacity(70);
  const auto plan = Plan();
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->num_kv_blocks, 70);
  EXPECT_EQ(plan->kv_cache_tokens(), 70 * 16);
  EXPECT_EQ(plan->model.max_model_len(), 1024u);
  EXPECT_EQ(plan->model.architecture(), "DeepseekV3ForCausalLM");
}

TEST_F(GroupPlanTest, TakesNoMoreBlocksThanAllSequencesCouldUse) {
  options_.max_model_len = 100;  // seven blocks
  const auto plan = Plan();
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->num_kv_blocks, 4 * 7);
  EXPECT_EQ(plan->model.max_model_len(), 100u);
}

TEST_F(GroupPlanTest, ServesShorterRequestsWhenTheModelsLengthDoesNotFit) {
  descriptions_[0].mutable_plan()->set_kv_block_capacity(10);
  const auto plan = Plan();
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->model.max_model_len(), 160u);
}

TEST_F(GroupPlanTest, RefusesALengthThatWasAskedForAndDoesNotFit) {
  descriptions_[0].mutable_plan()->set_kv_block_capacity(10);
  options_.max_model_len = 200;
  ExpectRefused({"(200), 13 KV blocks are needed", "the available 10", "to at most 160"});
  options_.max_model_len = 2000;
  ExpectRefused({"--max-model-len is 2000", "1024"});
}

TEST_F(GroupPlanTest, RefusesWorkersWithoutMemoryForTheCache) {
  descriptions_[2].mutable_plan()->set_kv_block_capacity(0);
  ExpectRefused({"worker 2 (unix:/w2) has no memory for KV blocks", "budget is 4 bytes"});
}

TEST_F(GroupPlanTest, NamesTheWorkerThatDiffersAndBothValues) {
  descriptions_[2].set_model_fingerprint("xyz");
  ExpectRefused({"worker 2 (unix:/w2) has model fingerprint 'xyz'", "'abc'", "the same --model"});
  descriptions_[2].set_model_fingerprint("abc");
  descriptions_[1].set_dtype("bfloat16");
  ExpectRefused({"worker 1 (unix:/w1) has --dtype 'bfloat16'", "'float32'"});
  descriptions_[1].set_dtype("float32");
  descriptions_[1].set_activation_quantization("fp8");
  ExpectRefused({"worker 1 (unix:/w1) has --activation-quantization 'fp8'", "'none'"});
  descriptions_[1].set_activation_quantization("none");
  descriptions_[1].set_version("0.9");
  ExpectRefused({"worker 1 (unix:/w1) is of version '0.9', expected the coordinator's '1.0'"});
  descriptions_[1].set_version("1.0");
  descriptions_[0].add_eos_token_ids(2);
  ExpectRefused({"end-of-sequence tokens"});
}

TEST_F(GroupPlanTest, ChoosesCollectivesByDevicesAndHostsUnlessTold) {
  EXPECT_EQ(Plan()->collectives, v1::JoinRequest::COLLECTIVES_SHM);
  addresses_[2] = "10.0.0.2:7000";
  EXPECT_EQ(Plan()->collectives, v1::JoinRequest::COLLECTIVES_GLOO);
  for (v1::DescribeResponse& description : descriptions_) description.set_device("cuda");
  EXPECT_EQ(Plan()->collectives, v1::JoinRequest::COLLECTIVES_NCCL);
  addresses_ = {"10.0.0.2:7000", "10.0.0.2:7001", "10.0.0.2:7002"};
  EXPECT_EQ(Plan()->collectives, v1::JoinRequest::COLLECTIVES_PEER);
  options_.collectives = v1::JoinRequest::COLLECTIVES_GLOO;
  EXPECT_EQ(Plan()->collectives, v1::JoinRequest::COLLECTIVES_GLOO);
  options_.collectives = v1::JoinRequest::COLLECTIVES_UNSPECIFIED;
  for (int rank = 3; rank < 9; ++rank) {  // more than reach each other's memory
    addresses_.push_back("10.0.0.2:" + std::to_string(7000 + rank));
    descriptions_.push_back(descriptions_[0]);
  }
  EXPECT_EQ(Plan()->collectives, v1::JoinRequest::COLLECTIVES_NCCL);
}

TEST_F(GroupPlanTest, TellsOperatorsTheLinesTheyKnow) {
  EXPECT_THAT(DescribePlan(*Plan(), descriptions_),
              AllOf(Contains("KV cache size: 1600 tokens"),
                    Contains("Maximum concurrency for 1024 tokens per request: 1.56x")));
}

}  // namespace
}  // namespace fathom
