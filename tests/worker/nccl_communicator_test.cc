#include "worker/nccl_communicator.h"

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "gtest/gtest.h"
#include "tests/worker/rank_group.h"
#include "worker/shm_communicator.h"

namespace fathom {
namespace {

std::unique_ptr<GroupCommunicator> HostOfRank(int rank, int world_size) {
  return MakeShmCommunicator({.rank = rank, .world_size = world_size, .epoch = 1});
}

// Lives as long as the process.
std::unique_ptr<Device>*& DeviceHere() {
  static std::unique_ptr<Device>* device = nullptr;
  return device;
}

// The GPU of this rank's own number, opened in the rank's own process.
std::unique_ptr<GroupCommunicator> Make(int rank, int world_size) {
  DeviceHere() = new std::unique_ptr<Device>(*OpenCudaDevice({.gpu = rank}));
  return *MakeNcclCommunicator(
      {.rank = rank, .world_size = world_size, .timeout = absl::Seconds(20)}, **DeviceHere(),
      HostOfRank(rank, world_size));
}

// Skips where there are fewer GPUs, or no NCCL. Asks in other processes, since this one forks.
class NcclCommunicatorTest : public testing::Test {
 protected:
  static absl::Status Need(int num_gpus) {
    const auto probe =
        RunInProcesses(num_gpus, HostOfRank, [](GroupCommunicator& host) -> absl::Status {
          const int rank = host.rank();
          const auto device = OpenCudaDevice({.gpu = rank});
          if (!device.ok()) return absl::UnavailableError(absl::StrCat("no GPU ", rank, " here"));
          return MakeNcclCommunicator({}, **device, HostOfRank(0, 1)).status();
        });
    for (const absl::Status& status : probe) RETURN_IF_ERROR(status);
    return absl::OkStatus();
  }
};

absl::Status UseEverything(GroupCommunicator& communicator) {
  Device& device = **DeviceHere();
  const int world = communicator.world_size();
  for (const int64_t count : {1, 7168, 1'000'000}) {
    ASSIGN_OR_RETURN(const Buffer memory, device.Allocate(count * 4));
    ASSIGN_OR_RETURN(const Buffer whole, device.Allocate(world * count * 4));
    const Tensor tensor(memory.data(), DType::kF32, {count});
    const Tensor whole_tensor(whole.data(), DType::kF32, {world, count});
    std::vector<float> values(count, static_cast<float>(communicator.rank() + 1));
    device.CopyFromHost(values.data(), tensor);
    RETURN_IF_ERROR(communicator.GatherToRank0(tensor, whole_tensor));
    RETURN_IF_ERROR(communicator.AllReduceSum(tensor));
    device.CopyToHost(tensor, values.data());
    const float sum = static_cast<float>(world * (world + 1)) / 2;  // small whole numbers: exact
    for (const float value : values) {
      if (value != sum) return absl::InternalError(absl::StrCat("sum is ", value));
    }
    if (communicator.rank() == 0) {
      std::vector<float> gathered(world * count);
      device.CopyToHost(whole_tensor, gathered.data());
      for (int rank = 0; rank < world; ++rank) {
        if (gathered[rank * count] != static_cast<float>(rank + 1)) {
          return absl::InternalError(absl::StrCat("rank ", rank, " gave ", gathered[rank * count]));
        }
      }
    }
  }
  int32_t token = communicator.rank() == 0 ? 4711 : 0;
  RETURN_IF_ERROR(communicator.BroadcastFromRank0(&token, sizeof token));
  return token == 4711 ? communicator.status() : absl::InternalError("broadcast differs");
}

TEST_F(NcclCommunicatorTest, AGroupOfOneSumsGathersAndStops) {
  if (const absl::Status need = Need(1); !need.ok()) GTEST_SKIP() << need.message();
  const auto statuses = RunInProcesses(1, Make, [](GroupCommunicator& communicator) {
    RETURN_IF_ERROR(UseEverything(communicator));
    communicator.Abort();
    const absl::Status status = communicator.AllReduceSum(Tensor());
    EXPECT_EQ(status.code(), absl::StatusCode::kAborted) << status;
    return absl::IsAborted(status) ? absl::OkStatus() : absl::InternalError("goes on");
  });
  EXPECT_TRUE(statuses[0].ok()) << statuses[0];
}

TEST_F(NcclCommunicatorTest, TwoGpusSumAndGather) {
  if (const absl::Status need = Need(2); !need.ok()) GTEST_SKIP() << need.message();
  for (const absl::Status& status : RunInProcesses(2, Make, UseEverything)) {
    EXPECT_TRUE(status.ok()) << status;
  }
}

TEST_F(NcclCommunicatorTest, ARankThatStaysAwayEndsTheOthersByTheTimeout) {
  if (const absl::Status need = Need(2); !need.ok()) GTEST_SKIP() << need.message();
  const auto make = [](int rank, int world_size) {
    DeviceHere() = new std::unique_ptr<Device>(*OpenCudaDevice({.gpu = rank}));
    return *MakeNcclCommunicator(
        {.rank = rank, .world_size = world_size, .timeout = absl::Seconds(1)}, **DeviceHere(),
        HostOfRank(rank, world_size));
  };
  const auto statuses = RunInProcesses(2, make, [](GroupCommunicator& communicator) {
    if (communicator.rank() == 1) {
      absl::SleepFor(absl::Seconds(3));
      return absl::OkStatus();
    }
    const absl::Status status = UseEverything(communicator);
    return communicator.status().ok() ? status : communicator.status();
  });
  EXPECT_EQ(statuses[0].code(), absl::StatusCode::kDeadlineExceeded) << statuses[0];
}

TEST(NcclUnavailableTest, DevicesOfTheHostAreRefusedInWords) {
  const auto device = *OpenCpuDevice({});
  const absl::Status status = MakeNcclCommunicator({}, *device, HostOfRank(0, 1)).status();
  EXPECT_FALSE(status.ok());
  EXPECT_TRUE(absl::StrContains(status.message(), "--collectives nccl")) << status;
}

}  // namespace
}  // namespace fathom
