#include "worker/step_recordings.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/worker/golden.h"
#include "tests/worker/recording_device.h"
#include "tests/worker/shard_group.h"
#include "worker/step_tensors.h"

namespace fathom {
namespace {

class StepRecordingsTest : public testing::Test {
 protected:
  // Makes a step of this shape; it counts the steps that the device did, not those it noted.
  absl::Status Step(int64_t num_sequences, int64_t width = 4,
                    const StepRecordings::Owners& owners = {1, 1}) {
    return recordings_.Run({num_sequences, width}, owners, [this] {
      static_cast<RecordingOps&>(device_.ops()).Do([this] { ++num_done_; });
      return absl::OkStatus();
    });
  }

  RecordingDevice device_;
  StepRecordings recordings_{device_};
  int num_done_ = 0;
};

TEST_F(StepRecordingsTest, ShapesAreRecordedWhenTheyComeForTheSecondTime) {
  for (int i = 1; i <= 4; ++i) {
    ASSERT_TRUE(Step(3).ok());
    EXPECT_EQ(num_done_, i) << "each step is done once";
    EXPECT_EQ(device_.num_recorded(), i == 1 ? 0 : 1);
    EXPECT_EQ(device_.num_replayed(), i - 1);
  }
  ASSERT_TRUE(Step(3, /*width=*/8).ok());
  ASSERT_TRUE(Step(4).ok());
  EXPECT_EQ(device_.num_recorded(), 1) << "these came once";
  EXPECT_EQ(num_done_, 6);
}

TEST_F(StepRecordingsTest, TheLeastRecentlyUsedGoesFirst) {
  constexpr int kMost = StepRecordings::kMostRecordings;
  for (int round = 0; round < 2; ++round) {
    for (int shape = 0; shape < kMost; ++shape) ASSERT_TRUE(Step(shape).ok());
  }
  ASSERT_EQ(device_.num_recorded(), kMost);
  ASSERT_TRUE(Step(0).ok());      // now 1 is the oldest
  ASSERT_TRUE(Step(kMost).ok());  // takes its place
  ASSERT_TRUE(Step(0).ok());
  ASSERT_TRUE(Step(2).ok());
  EXPECT_EQ(device_.num_recorded(), kMost);
  for (int i = 0; i < 2; ++i) ASSERT_TRUE(Step(1).ok());
  EXPECT_EQ(device_.num_recorded(), kMost + 1);
}

TEST_F(StepRecordingsTest, RecordingsOfAnotherCacheOrGroupAreForgotten) {
  for (int i = 0; i < 2; ++i) ASSERT_TRUE(Step(3).ok());
  for (const StepRecordings::Owners& owners :
       {StepRecordings::Owners{2, 1}, StepRecordings::Owners{2, 2}}) {
    const int before = device_.num_replayed();
    ASSERT_TRUE(Step(3, 4, owners).ok());
    EXPECT_EQ(device_.num_replayed(), before);
    ASSERT_TRUE(Step(3, 4, owners).ok());
    EXPECT_EQ(device_.num_replayed(), before + 1);
  }
}

TEST_F(StepRecordingsTest, ErrorsOfTheStepAreReturnedAndNothingIsKept) {
  const auto fail = [] { return absl::AbortedError("a peer is gone"); };
  ASSERT_TRUE(Step(3).ok());
  EXPECT_TRUE(absl::IsAborted(recordings_.Run({3, 4}, {1, 1}, fail)));
  EXPECT_TRUE(absl::IsAborted(recordings_.Run({3, 4}, {1, 1}, fail)));
  EXPECT_EQ(device_.num_recorded(), 0);
}

TEST_F(StepRecordingsTest, DevicesThatRecordNothingDoEveryStep) {
  const auto device = *OpenCpuDevice({});
  StepRecordings recordings(*device);
  int num_done = 0;
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(recordings.Run({3, 4}, {1, 1}, [&] { return ++num_done, absl::OkStatus(); }).ok());
  }
  EXPECT_EQ(num_done, 3);
}

TEST(StepTensorsTest, AddressesDependOnTheShapeAndTablesArePaddedToAPowerOfTwo) {
  RecordingDevice device;
  const StepTensorsOptions options = {
      .max_tokens = 8, .max_logit_rows = 4, .max_sequences = 4, .max_blocks = 10};
  StepTensors tensors(options, device);
  ASSERT_TRUE(tensors.Allocate().ok());
  const auto batch_of = [](const std::vector<int32_t>& blocks) {
    std::vector<int32_t> tokens(16 * blocks.size(), 7);
    const SequenceSlice slice = {.token_ids = tokens,
                                 .blocks = blocks,
                                 .first = static_cast<int>(tokens.size()) - 1,
                                 .count = 1};
    return BuildStepBatch({slice, slice}, 16);
  };
  const StepBatch five = batch_of({4, 3, 2, 1, 9}), six = batch_of({14, 13, 12, 11, 19, 18});
  tensors.Set(five);
  const AttentionBatch first = tensors.attention();
  EXPECT_EQ(first.block_tables.DebugString(), "I32[2, 8]");
  EXPECT_EQ(first.host_context_lens, five.context_lens.data());
  tensors.Set(six);
  const AttentionBatch second = tensors.attention();
  EXPECT_EQ(second.block_tables.DebugString(), "I32[2, 8]");
  EXPECT_EQ(second.block_tables.raw(), first.block_tables.raw());
  EXPECT_EQ(second.context_lens.raw(), first.context_lens.raw());
  const auto* table = second.block_tables.data<int32_t>();
  EXPECT_THAT(std::vector<int32_t>(table, table + 16),
              testing::ElementsAre(14, 13, 12, 11, 19, 18, 0, 0, 14, 13, 12, 11, 19, 18, 0, 0));
  EXPECT_EQ(second.context_lens.data<int32_t>()[1], 96);
}

// Decoding through the cache, with sequences that come, grow past a block and go, on a device that
// records and on one that does not.
TEST(RecordedModelTest, ReplayedStepsGiveTheSameBits) {
  for (const std::string model : {"v3_tiny", "v3_tiny_fp8", "v2_tiny_softmax"}) {
    const Golden golden(model + "/golden.safetensors");
    std::vector<std::vector<float>> results[2];
    int num_replayed = 0;
    for (const bool records : {false, true}) {
      ShardGroupOptions options;
      options.device = records ? DeviceKind::kRecordingCpu : DeviceKind::kCpu;
      options.shard.quantize_activations = model == "v3_tiny_fp8";
      const auto group = *ShardGroup::Load(GoldenCheckpoint(model), options);
      TestSequence a = group->NewSequence(golden.Ints("p64.tokens"), 0);
      TestSequence b = group->NewSequence(golden.Ints("p300.tokens"), 10);
      constexpr auto kLast = ShardGroup::Want::kLastToken;
      auto& logits = results[records];
      logits.push_back(group->Step({{&a, 20}, {&b, 100}}, kLast));
      for (int i = 0; i < 30; ++i) logits.push_back(group->Step({{&a, 1}, {&b, 1}}, kLast));
      for (int i = 0; i < 5; ++i) logits.push_back(group->Step({{&b, 1}}, kLast));
      logits.push_back(group->Step({{&a, 2}, {&b, 1}}, kLast));
      for (int i = 0; i < 5; ++i) logits.push_back(group->Step({{&b, 1}, {&a, 1}}, kLast));
      if (records) {
        num_replayed = static_cast<const RecordingDevice&>(group->device(0)).num_replayed();
      }
    }
    EXPECT_EQ(results[0], results[1]) << model;
    EXPECT_EQ(num_replayed, 29 + 4 + 5) << model;
  }
}

}  // namespace
}  // namespace fathom
