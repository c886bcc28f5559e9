#include "worker/memory_plan.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int64_t kGib = int64_t{1} << 30;
constexpr int64_t kMib = int64_t{1} << 20;

// Two workers on a host of 10 GiB: each may take 4.5 GiB, of which 4 GiB are weights and
// activations.
MemoryNeeds Needs() {
  return {.host_bytes = 10 * kGib,
          .workers_on_this_host = 2,
          .weight_bytes = 3 * kGib,
          .activation_bytes = kGib,
          .kv_block_bytes = kMib,
          .block_size = 16,
          .max_model_len = 1024,
          .max_position_embeddings = 4096};
}

MemoryPlanOptions WithoutLimit() { return {.default_kv_cache_limit_bytes = 1000 * kGib}; }

TEST(MemoryPlanTest, KvBlocksGetWhatTheShareLeaves) {
  const auto plan = PlanWorkerMemory(WithoutLimit(), Needs());
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->budget_bytes, static_cast<int64_t>(4.5 * kGib));
  EXPECT_EQ(plan->weight_bytes, 3 * kGib);
  EXPECT_EQ(plan->activation_bytes, kGib);
  EXPECT_EQ(plan->kv_block_bytes, kMib);
  EXPECT_EQ(plan->kv_block_capacity, 512);
  EXPECT_EQ(plan->max_model_len, 1024);
}

TEST(MemoryPlanTest, ASmallerShareLeavesLess) {
  MemoryPlanOptions options = WithoutLimit();
  options.gpu_memory_utilization = 0.85;
  EXPECT_EQ(PlanWorkerMemory(options, Needs())->kv_block_capacity, 256);
}

TEST(MemoryPlanTest, TheDefaultLimitHoldsUnlessBytesAreGiven) {
  MemoryPlanOptions options = {.default_kv_cache_limit_bytes = 100 * kMib};
  EXPECT_EQ(PlanWorkerMemory(options, Needs())->kv_block_capacity, 100);
  options.kv_cache_memory_bytes = 300 * kMib;
  const auto plan = PlanWorkerMemory(options, Needs());
  EXPECT_EQ(plan->kv_block_capacity, 300);
  EXPECT_EQ(plan->budget_bytes, 4 * kGib + 300 * kMib);
}

TEST(MemoryPlanTest, BytesThatTheHostDoesNotHaveAreRefused) {
  const auto plan = PlanWorkerMemory({.kv_cache_memory_bytes = kGib + 1}, Needs());
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(plan.status().message()),
              AllOf(HasSubstr("2 workers"), HasSubstr("at most 1073741824")));
}

TEST(MemoryPlanTest, WithoutALengthTheModelsOwnIsTakenOrWhatFits) {
  MemoryNeeds needs = Needs();
  needs.max_model_len = 0;
  EXPECT_EQ(PlanWorkerMemory(WithoutLimit(), needs)->max_model_len, 4096);
  needs.max_position_embeddings = 1 << 20;
  EXPECT_EQ(PlanWorkerMemory(WithoutLimit(), needs)->max_model_len, 512 * 16);
}

TEST(MemoryPlanTest, ASequenceThatDoesNotFitIsRefusedWithTheLengthThatDoes) {
  MemoryNeeds needs = Needs();
  needs.max_model_len = 4096;
  const auto plan = PlanWorkerMemory({.default_kv_cache_limit_bytes = 100 * kMib}, needs);
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(plan.status().message()),
              AllOf(HasSubstr("To serve at least one request with the model's max seq len (4096), "
                              "256 MiB KV cache is needed"),
                    HasSubstr("larger than the available KV cache memory (100 MiB)"),
                    HasSubstr("estimated maximum model length is 1600"),
                    HasSubstr("--kv-cache-memory-bytes")));
}

TEST(MemoryPlanTest, NoRoomForABlockIsRefused) {
  MemoryNeeds needs = Needs();
  needs.weight_bytes = 5 * kGib;
  const auto plan = PlanWorkerMemory(WithoutLimit(), needs);
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(plan.status().message()),
              AllOf(HasSubstr("No available memory for the cache blocks"),
                    HasSubstr("the weights take 5.0 GiB"), HasSubstr("4.5 GiB")));
}

TEST(MemoryPlanTest, ALengthBeyondTheModelIsRefused) {
  MemoryNeeds needs = Needs();
  needs.max_model_len = 4097;
  EXPECT_EQ(PlanWorkerMemory(WithoutLimit(), needs).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(MemoryPlanTest, WhatOthersHoldOfAGpuIsRefusedWithNumbers) {
  MemoryNeeds needs = Needs();
  needs.workers_on_this_host = 1;
  needs.available_bytes = 8 * kGib;  // of 10, of which 9 are asked for
  const auto plan = PlanWorkerMemory(WithoutLimit(), needs);
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(plan.status().message()),
              AllOf(HasSubstr("of the GPU's 10.0 GiB only 8.0 GiB"), HasSubstr("for 9.0 GiB"),
                    HasSubstr("at most 0.8,")));
  MemoryPlanOptions options = WithoutLimit();
  options.kv_cache_memory_bytes = 4 * kGib;
  EXPECT_TRUE(PlanWorkerMemory(options, needs).ok());
  options.kv_cache_memory_bytes = 4 * kGib + 100;
  EXPECT_THAT(std::string(PlanWorkerMemory(options, needs).status().message()),
              HasSubstr("decreasing --kv-cache-memory-bytes by 100,"));
}

TEST(MemoryPlanTest, PlacesInTheCacheStayWithin32Bits) {
  MemoryNeeds needs = Needs();
  needs.kv_block_bytes = 1;
  EXPECT_EQ(PlanWorkerMemory(WithoutLimit(), needs)->kv_block_capacity, INT32_MAX / 16);
}

TEST(HostMemoryTest, IsSomethingSensible) {
  EXPECT_GT(HostMemoryBytes(), 64 * kMib);
  EXPECT_LT(HostMemoryBytes(), int64_t{1} << 50);
}

}  // namespace
}  // namespace fathom
