#include "worker/shm_communicator.h"

#include <signal.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <numeric>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "gtest/gtest.h"
#include "tests/worker/rank_group.h"
#include "worker/shared_segment.h"

namespace fathom {
namespace {

constexpr uint64_t kEpoch = 4711;

std::unique_ptr<GroupCommunicator> Make(int rank, int world_size) {
  return MakeShmCommunicator({.rank = rank, .world_size = world_size, .epoch = kEpoch});
}

int SegmentsOfEpoch(uint64_t epoch) {
  int found = 0;
  for (const auto& file : std::filesystem::directory_iterator("/dev/shm")) {
    found += absl::StartsWith(file.path().filename().string(), absl::StrCat("fathom-", epoch, "-"));
  }
  return found;
}

absl::Status SumOnes(Communicator& communicator, int64_t count) {
  std::vector<float> ones(count, 1.0f);
  RETURN_IF_ERROR(communicator.AllReduceSum(Tensor(ones.data(), DType::kF32, {count})));
  const float sum = std::accumulate(ones.begin(), ones.end(), 0.0f);
  return sum == static_cast<float>(count * communicator.world_size())
             ? absl::OkStatus()
             : absl::InternalError(absl::StrCat("sum ", sum));
}

TEST(ShmCommunicatorTest, TheNameIsGoneAsSoonAsAllAreConnected) {
  const auto statuses = RunInThreads(3, Make, [](GroupCommunicator& communicator) {
    RETURN_IF_ERROR(SumOnes(communicator, 10));  // rank 0 has come back from Connect
    EXPECT_EQ(SegmentsOfEpoch(kEpoch), 0);
    return absl::OkStatus();
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

TEST(ShmCommunicatorTest, TheNameIsGoneWhenConnectingFailed) {
  BlackboardKeeper keeper;
  LocalBlackboard blackboard(keeper, 1);
  auto communicator = MakeShmCommunicator({.rank = 0, .world_size = 2, .epoch = 4712});
  EXPECT_FALSE(communicator->Connect(blackboard, absl::Now() + absl::Milliseconds(10)).ok());
  communicator.reset();
  EXPECT_EQ(SegmentsOfEpoch(4712), 0);
}

TEST(ShmCommunicatorTest, RanksOfAnotherEpochOrWorldAreRefused) {
  BlackboardKeeper keeper;
  LocalBlackboard blackboard(keeper, 1);
  const auto first = MakeShmCommunicator({.rank = 0, .world_size = 2, .epoch = 1});
  std::thread rank0(
      [&] { EXPECT_FALSE(first->Connect(blackboard, absl::Now() + absl::Seconds(20)).ok()); });
  const auto late = MakeShmCommunicator({.rank = 1, .world_size = 2, .epoch = 2});
  const absl::Status status = late->Connect(blackboard, absl::Now() + absl::Seconds(20));
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "epoch 1")) << status;
  const auto other = MakeShmCommunicator({.rank = 1, .world_size = 3, .epoch = 1});
  EXPECT_EQ(other->Connect(blackboard, absl::Now() + absl::Seconds(20)).code(),
            absl::StatusCode::kFailedPrecondition);
  first->Abort();
  rank0.join();
}

TEST(ShmCommunicatorTest, TwoWorkersCannotBeTheSameRank) {
  BlackboardKeeper keeper;
  LocalBlackboard blackboard(keeper, 1);
  const auto rank0 = MakeShmCommunicator({.rank = 0, .world_size = 3, .epoch = 1});
  const auto rank1 = MakeShmCommunicator({.rank = 1, .world_size = 3, .epoch = 1});
  const auto twin = MakeShmCommunicator({.rank = 1, .world_size = 3, .epoch = 1});
  std::vector<absl::Status> statuses(3);
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&, i] {
      GroupCommunicator& communicator = i == 0 ? *rank0 : i == 1 ? *rank1 : *twin;
      statuses[i] = communicator.Connect(blackboard, absl::Now() + absl::Milliseconds(300));
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_FALSE(statuses[0].ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(statuses[1]) != absl::IsFailedPrecondition(statuses[2]))
      << statuses[1] << statuses[2];
}

TEST(ShmCommunicatorTest, RanksThatDoDifferentThingsAreToldSo) {
  const auto statuses = RunInThreads(3, Make, [](GroupCommunicator& communicator) {
    return SumOnes(communicator, communicator.rank() == 2 ? 20 : 10);
  });
  int told = 0;
  for (const absl::Status& status : statuses) {
    EXPECT_FALSE(status.ok());
    told += absl::IsInternal(status) && absl::StrContains(status.message(), "80 bytes");
  }
  EXPECT_EQ(told, 3);
}

TEST(ShmCommunicatorTest, AStoppedProcessRunsIntoTheTimeout) {
  const auto make = [](int rank, int world_size) {
    return MakeShmCommunicator({.rank = rank,
                                .world_size = world_size,
                                .epoch = kEpoch,
                                .timeout = absl::Milliseconds(150)});
  };
  const auto statuses = RunInProcesses(3, make, [](GroupCommunicator& communicator) {
    RETURN_IF_ERROR(SumOnes(communicator, 10));
    if (communicator.rank() == 1) absl::SleepFor(absl::Milliseconds(600));
    return SumOnes(communicator, 10);
  });
  EXPECT_TRUE(absl::IsDeadlineExceeded(statuses[0]) || absl::IsAborted(statuses[0]));
  EXPECT_TRUE(absl::IsDeadlineExceeded(statuses[2]) || absl::IsAborted(statuses[2]));
  EXPECT_TRUE(absl::IsDeadlineExceeded(statuses[0]) || absl::IsDeadlineExceeded(statuses[2]));
  EXPECT_FALSE(statuses[1].ok());
}

TEST(ShmCommunicatorTest, SaysHowMuchSharedMemoryItNeeds) {
  EXPECT_EQ(ShmBytesNeeded({.world_size = 8}) >> 20, 16);  // two windows of 1 MiB each, and a page
  const absl::StatusOr<std::unique_ptr<SharedSegment>> huge =
      SharedSegment::Create("test", int64_t{1} << 50);
  ASSERT_FALSE(huge.ok());
  EXPECT_EQ(huge.status().code(), absl::StatusCode::kResourceExhausted) << huge.status();
  EXPECT_TRUE(absl::StrContains(huge.status().message(), "1125899906842624 bytes"))
      << huge.status();
}

TEST(SharedSegmentTest, AClaimEndsWithItsHolder) {
  auto segment = SharedSegment::Create("test", 4096);
  ASSERT_TRUE(segment.ok()) << segment.status();
  auto other = SharedSegment::Open((*segment)->name(), 4096);
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_FALSE((*segment)->IsClaimedElsewhere(1));
  EXPECT_TRUE((*other)->ClaimRank(1).ok());
  EXPECT_TRUE((*segment)->IsClaimedElsewhere(1));
  EXPECT_FALSE((*segment)->IsClaimedElsewhere(0));
  EXPECT_EQ((*segment)->ClaimRank(1).code(), absl::StatusCode::kFailedPrecondition);
  other->reset();
  EXPECT_FALSE((*segment)->IsClaimedElsewhere(1));
}

TEST(SharedSegmentTest, NamesOfDeadCreatorsAreRemovedAndOthersAreNot) {
  auto living = SharedSegment::Create("test", 4096);
  ASSERT_TRUE(living.ok());
  const std::string left_behind = absl::StrCat("/dev/shm/fathom-test-", getpid());
  std::ofstream(left_behind) << "x";
  SharedSegment::RemoveAbandoned(absl::Now());
  EXPECT_TRUE(std::filesystem::exists(left_behind)) << "it may be about to be claimed";
  SharedSegment::RemoveAbandoned(absl::Now() + absl::Minutes(1));
  EXPECT_FALSE(std::filesystem::exists(left_behind));
  EXPECT_TRUE(std::filesystem::exists("/dev/shm" + (*living)->name()));
}

TEST(SharedSegmentTest, OpeningWhatIsNotThereOrHasAnotherSizeFails) {
  EXPECT_EQ(SharedSegment::Open("/fathom-test-none", 4096).status().code(),
            absl::StatusCode::kNotFound);
  auto segment = SharedSegment::Create("test", 4096);
  ASSERT_TRUE(segment.ok());
  EXPECT_EQ(SharedSegment::Open((*segment)->name(), 8192).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace fathom
