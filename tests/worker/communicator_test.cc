// What both communicators promise; what only one of them does is in its own test.
#include "worker/communicator.h"

#include <signal.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "gtest/gtest.h"
#include "kernels/device.h"
#include "kernels/number_formats.h"
#include "kernels/ops.h"
#include "tests/worker/rank_group.h"
#include "worker/gloo_communicator.h"
#include "worker/shm_communicator.h"

namespace fathom {
namespace {

constexpr uint64_t kSeed = 1234;

enum class Kind { kShm, kGloo };

std::unique_ptr<GroupCommunicator> Make(Kind kind, int rank, int world_size,
                                        absl::Duration timeout) {
  if (kind == Kind::kGloo) {
    return MakeGlooCommunicator({.rank = rank, .world_size = world_size, .timeout = timeout});
  }
  // Small windows, so that tensors of a test go in several chunks.
  return MakeShmCommunicator({.rank = rank,
                              .world_size = world_size,
                              .epoch = 1,
                              .window_bytes = 16 << 10,
                              .timeout = timeout});
}

MakeCommunicator Maker(Kind kind, absl::Duration timeout = absl::Seconds(20)) {
  return [=](int rank, int world_size) { return Make(kind, rank, world_size, timeout); };
}

void ExpectAllOk(const std::vector<absl::Status>& statuses) {
  for (size_t rank = 0; rank < statuses.size(); ++rank) {
    EXPECT_TRUE(statuses[rank].ok()) << "rank " << rank << ": " << statuses[rank];
  }
}

// What rank `rank` has at place i, of very different sizes, so that another order of summing would
// give other bits.
float ValueOf(int rank, int64_t i) {
  std::minstd_rand random(static_cast<uint32_t>(kSeed + rank * 7919 + i * 104729));
  random.discard(3);
  const float exponent = static_cast<float>(random() % 16) - 8.0f;
  return (static_cast<float>(random()) / 1e9f - 1.0f) * std::exp2(exponent);
}

class CommunicatorTest : public testing::TestWithParam<Kind> {
 protected:
  CommunicatorTest() { std::printf("seed %llu\n", static_cast<unsigned long long>(kSeed)); }
};

INSTANTIATE_TEST_SUITE_P(Both, CommunicatorTest, testing::Values(Kind::kShm, Kind::kGloo),
                         [](const auto& info) {
                           return info.param == Kind::kShm ? "Shm" : "Gloo";
                         });

absl::Status ReduceAndCompareF32(Communicator& communicator, int64_t count) {
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = ValueOf(communicator.rank(), i);
  RETURN_IF_ERROR(communicator.AllReduceSum(Tensor(values.data(), DType::kF32, {count})));
  for (int64_t i = 0; i < count; ++i) {
    float expected = ValueOf(0, i);
    for (int rank = 1; rank < communicator.world_size(); ++rank) expected += ValueOf(rank, i);
    if (BitsOf(values[i]) != BitsOf(expected)) {
      return absl::InternalError(
          absl::StrCat("of ", count, ", [", i, "] is ", values[i], ", expected ", expected));
    }
  }
  return absl::OkStatus();
}

absl::Status ReduceAndCompareBF16(Communicator& communicator, int64_t count) {
  std::vector<BFloat16> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = ToBFloat16(ValueOf(communicator.rank(), i));
  RETURN_IF_ERROR(communicator.AllReduceSum(Tensor(values.data(), DType::kBF16, {count})));
  for (int64_t i = 0; i < count; ++i) {
    float expected = ToFloat(ToBFloat16(ValueOf(0, i)));
    for (int rank = 1; rank < communicator.world_size(); ++rank) {
      expected += ToFloat(ToBFloat16(ValueOf(rank, i)));
    }
    if (values[i].bits != ToBFloat16(expected).bits) {
      return absl::InternalError(absl::StrCat("of ", count, ", [", i, "] differs"));
    }
  }
  return absl::OkStatus();
}

// The sum of all ranks' parts, added to what every rank has, and its norm, as two operations give
// it.
absl::Status ReduceAddNormAndCompare(Communicator& communicator, int64_t rows) {
  constexpr int64_t kWidth = 96;
  constexpr float kEps = 1e-6f;
  const auto device = *OpenCpuDevice({});
  const auto tensor = [&](std::vector<float>& values, int rank) {
    values.resize(rows * kWidth);
    for (size_t i = 0; i < values.size(); ++i) values[i] = ValueOf(rank, static_cast<int64_t>(i));
    return Tensor(values.data(), DType::kF32, {rows, kWidth});
  };
  std::vector<float> memory[6], weights(kWidth, 1.25f);
  const int rank = communicator.rank(), common = communicator.world_size();
  const Tensor weight(weights.data(), DType::kF32, {kWidth});
  const Tensor partial = tensor(memory[0], rank), same_partial = tensor(memory[1], rank);
  const Tensor residual = tensor(memory[2], common), same_residual = tensor(memory[3], common);
  const Tensor normed = tensor(memory[4], 0), same_normed = tensor(memory[5], 0);
  RETURN_IF_ERROR(
      communicator.AllReduceAddRmsNorm(device->ops(), partial, residual, weight, kEps, normed, {}));
  RETURN_IF_ERROR(communicator.AllReduceSum(same_partial));
  device->ops().AddRmsNorm(same_residual, same_partial, weight, kEps, same_normed, {});
  if (memory[2] == memory[3] && memory[4] == memory[5]) return absl::OkStatus();
  return absl::InternalError("not what AllReduceSum and AddRmsNorm give");
}

absl::Status GatherAndCompare(Communicator& communicator, int64_t rows) {
  std::vector<int32_t> part(rows * 3, communicator.rank() * 1000);
  for (int64_t i = 0; i < rows * 3; ++i) part[i] += static_cast<int32_t>(i % 997);
  std::vector<int32_t> whole;
  Tensor whole_tensor;
  if (communicator.rank() == 0) {
    whole.resize(part.size() * communicator.world_size());
    whole_tensor = Tensor(whole.data(), DType::kI32, {communicator.world_size(), rows, 3});
  }
  RETURN_IF_ERROR(
      communicator.GatherToRank0(Tensor(part.data(), DType::kI32, {rows, 3}), whole_tensor));
  for (size_t i = 0; i < whole.size(); ++i) {
    const auto rank = static_cast<int32_t>(i / part.size());
    if (whole[i] != rank * 1000 + static_cast<int32_t>(i % part.size() % 997)) {
      return absl::InternalError(absl::StrCat("[", i, "] is ", whole[i]));
    }
  }
  return absl::OkStatus();
}

absl::Status BroadcastAndCompare(Communicator& communicator, int64_t num_bytes) {
  std::string bytes(num_bytes, communicator.rank() == 0 ? 'x' : '?');
  if (communicator.rank() == 0) bytes[num_bytes / 2] = 'y';
  RETURN_IF_ERROR(communicator.BroadcastFromRank0(bytes.data(), num_bytes));
  std::string expected(num_bytes, 'x');
  expected[num_bytes / 2] = 'y';
  return bytes == expected ? absl::OkStatus() : absl::InternalError("broadcast differs");
}

// Small ones, ones around the limits of the methods, and ones of several chunks, mixed.
absl::Status UseEverything(Communicator& communicator) {
  for (const int64_t count : {1, 3, 64, 1000, 4096, 4097, 20000}) {
    RETURN_IF_ERROR(ReduceAndCompareF32(communicator, count));
    RETURN_IF_ERROR(ReduceAndCompareBF16(communicator, count));
    RETURN_IF_ERROR(GatherAndCompare(communicator, count));
    RETURN_IF_ERROR(ReduceAddNormAndCompare(communicator, 1 + count % 50));
    RETURN_IF_ERROR(BroadcastAndCompare(communicator, count));
    RETURN_IF_ERROR(BroadcastAndCompare(communicator, 8));
  }
  return absl::OkStatus();
}

TEST_P(CommunicatorTest, CollectivesGiveTheBitsOfRankOrderInThreads) {
  for (const int world_size : {2, 3, 8}) {
    ExpectAllOk(RunInThreads(world_size, Maker(GetParam()), UseEverything));
  }
}

TEST_P(CommunicatorTest, CollectivesGiveTheBitsOfRankOrderInProcesses) {
  for (const int world_size : {2, 5, 8}) {
    ExpectAllOk(RunInProcesses(world_size, Maker(GetParam()), UseEverything));
  }
}

TEST_P(CommunicatorTest, AGroupOfOneNeedsNobody) {
  ExpectAllOk(RunInThreads(1, Maker(GetParam()), UseEverything));
}

TEST_P(CommunicatorTest, AbortEndsABlockedCallAndAllLaterOnes) {
  absl::Notification others_may_go;
  const auto statuses =
      RunInThreads(2, Maker(GetParam(), absl::Seconds(100)), [&](GroupCommunicator& communicator) {
        if (communicator.rank() == 1) {
          others_may_go.WaitForNotification();
          return absl::OkStatus();
        }
        std::thread aborter([&] {
          absl::SleepFor(absl::Milliseconds(50));  // so that the call is blocked, most of the time
          communicator.Abort();
        });
        const absl::Status blocked = ReduceAndCompareF32(communicator, 10);
        aborter.join();
        others_may_go.Notify();
        EXPECT_EQ(blocked.code(), absl::StatusCode::kAborted) << blocked;
        char byte = 0;
        return communicator.BroadcastFromRank0(&byte, 1);
      });
  EXPECT_EQ(statuses[0].code(), absl::StatusCode::kAborted) << statuses[0];
  EXPECT_TRUE(absl::StrContains(statuses[0].message(), "rank 0")) << statuses[0];
}

TEST_P(CommunicatorTest, ARankThatIsAbortedTakesTheWaitingOnesAlong) {
  const auto statuses =
      RunInThreads(3, Maker(GetParam(), absl::Seconds(100)), [&](GroupCommunicator& communicator) {
        if (communicator.rank() == 2) communicator.Abort();
        return ReduceAndCompareF32(communicator, 10);
      });
  for (const absl::Status& status : statuses) {
    EXPECT_TRUE(absl::IsAborted(status) || absl::IsUnavailable(status)) << status;
  }
}

TEST_P(CommunicatorTest, ARankThatStaysAwayIsNamedAfterTheTimeout) {
  absl::Notification done;
  const auto statuses = RunInThreads(
      2, Maker(GetParam(), absl::Milliseconds(100)), [&](GroupCommunicator& communicator) {
        if (communicator.rank() == 1) {
          done.WaitForNotification();
          return absl::OkStatus();
        }
        const absl::Status status = ReduceAndCompareF32(communicator, 10);
        done.Notify();
        return status;
      });
  EXPECT_EQ(statuses[0].code(), absl::StatusCode::kDeadlineExceeded) << statuses[0];
  EXPECT_TRUE(absl::StrContains(statuses[0].message(), "rank 1")) << statuses[0];
}

TEST_P(CommunicatorTest, AKilledProcessIsNoticedByAllOthers) {
  const auto statuses = RunInProcesses(4, Maker(GetParam(), absl::Seconds(100)),
                                       [&](GroupCommunicator& communicator) {
                                         for (int round = 0; round < 100; ++round) {
                                           if (communicator.rank() == 2 && round == 17) {
                                             raise(SIGKILL);
                                           }
                                           RETURN_IF_ERROR(ReduceAndCompareF32(communicator, 100));
                                         }
                                         return absl::OkStatus();
                                       });
  EXPECT_EQ(statuses[2].code(), absl::StatusCode::kUnknown);
  for (const int rank : {0, 1, 3}) {
    // One that fails leaves, so another may see that first.
    EXPECT_TRUE(absl::IsUnavailable(statuses[rank]) || absl::IsAborted(statuses[rank]))
        << statuses[rank];
    EXPECT_TRUE(absl::StrContains(statuses[rank].message(), "rank ")) << statuses[rank];
  }
}

TEST_P(CommunicatorTest, ConnectingGivesUpAtTheDeadlineWhenARankDoesNotCome) {
  BlackboardKeeper keeper;
  LocalBlackboard blackboard(keeper, 1);
  for (const int rank : {0, 1}) {
    const auto lonely = Make(GetParam(), rank, 3, absl::Seconds(100));
    const absl::Status status = lonely->Connect(blackboard, absl::Now() + absl::Milliseconds(60));
    EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), "rank ")) << status;
    keeper.BeginEpoch(2);
    if (rank == 0) break;
  }
}

TEST_P(CommunicatorTest, AbortInterruptsConnecting) {
  BlackboardKeeper keeper;
  for (const int rank : {0, 1}) {
    LocalBlackboard blackboard(keeper, 1 + rank);
    const auto lonely = Make(GetParam(), rank, 2, absl::Seconds(100));
    std::thread aborter([&] {
      absl::SleepFor(absl::Milliseconds(30));
      lonely->Abort();
    });
    const absl::Status status = lonely->Connect(blackboard, absl::Now() + absl::Seconds(100));
    EXPECT_EQ(status.code(), absl::StatusCode::kAborted) << status;
    aborter.join();
  }
}

TEST(LonelyCommunicatorTest, DoesNothingButCopyAndAbort) {
  const std::unique_ptr<Communicator> lonely = MakeLonelyCommunicator();
  float value = 3.0f;
  float copy = 0.0f;
  EXPECT_TRUE(lonely->AllReduceSum(Tensor(&value, DType::kF32, {1})).ok());
  EXPECT_TRUE(
      lonely->GatherToRank0(Tensor(&value, DType::kF32, {1}), Tensor(&copy, DType::kF32, {1, 1}))
          .ok());
  EXPECT_EQ(value, 3.0f);
  EXPECT_EQ(copy, 3.0f);
  EXPECT_TRUE(lonely->is_recordable());
  EXPECT_NE(lonely->id(), MakeLonelyCommunicator()->id());
  lonely->Abort();
  EXPECT_EQ(lonely->BroadcastFromRank0(&value, 4).code(), absl::StatusCode::kAborted);
}

}  // namespace
}  // namespace fathom
