#include "worker/peer_communicator.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "gtest/gtest.h"
#include "kernels/number_formats.h"
#include "kernels/ops.h"
#include "tests/worker/distant_device.h"
#include "tests/worker/rank_group.h"
#include "worker/shm_communicator.h"

namespace fathom {
namespace {

std::unique_ptr<GroupCommunicator> MakeOn(Device& device, int rank, int world_size,
                                          absl::Duration timeout = absl::Seconds(20)) {
  return MakePeerCommunicator(
      {.rank = rank, .world_size = world_size, .timeout = timeout}, device,
      MakeShmCommunicator(
          {.rank = rank, .world_size = world_size, .epoch = 1, .timeout = absl::Seconds(20)}));
}

// --- without a GPU: memory that others can only be told of

struct FakeState {
  absl::Status open, connect;
  std::vector<std::string> handles;
  int num_sums = 0;
  std::atomic<bool> is_aborted = false;
  PeerFault fault;
};

class FakePeers final : public PeerMemory {
 public:
  FakePeers(int rank, FakeState& state) : rank_(rank), state_(state) {}
  std::string handle() const override { return absl::StrCat("memory of ", rank_); }
  absl::Status Connect(const std::vector<std::string>& handles) override {
    state_.handles = handles;
    return state_.connect;
  }
  void AllReduceSum(const Tensor&) override { ++state_.num_sums; }
  void GatherToRank0(const Tensor&, const Tensor&) override {}
  bool AllReduceAddRmsNorm(const Tensor&, const Tensor&, const Tensor&, float, const Tensor&,
                           const Tensor&, const Tensor&) override {
    return true;
  }
  void Abort() override { state_.is_aborted = true; }
  PeerFault fault() const override { return state_.fault; }

 private:
  const int rank_;
  FakeState& state_;
};

class FakeDevice final : public DistantDevice {
 public:
  explicit FakeDevice(FakeState& state) : state_(state) {}
  absl::StatusOr<std::unique_ptr<PeerMemory>> OpenPeerMemory(
      const PeerMemoryOptions& options) override {
    RETURN_IF_ERROR(state_.open);
    return std::make_unique<FakePeers>(options.rank, state_);
  }

 private:
  FakeState& state_;
};

class PeerCommunicatorTest : public testing::Test {
 protected:
  std::vector<absl::Status> Run(const RankBody& body) {
    for (FakeState& state : states_) devices_.push_back(std::make_unique<FakeDevice>(state));
    return RunInThreads(
        kWorld, [&](int rank, int world) { return MakeOn(*devices_[rank], rank, world); }, body);
  }
  static absl::Status Nothing(GroupCommunicator&) { return absl::OkStatus(); }

  static constexpr int kWorld = 3;
  std::vector<FakeState> states_{kWorld};
  std::vector<std::unique_ptr<FakeDevice>> devices_;
};

TEST_F(PeerCommunicatorTest, EveryRankLearnsOfTheMemoryOfAll) {
  for (const absl::Status& status : Run(Nothing)) EXPECT_TRUE(status.ok()) << status;
  const std::vector<std::string> expected = {"memory of 0", "memory of 1", "memory of 2"};
  for (const FakeState& state : states_) EXPECT_EQ(state.handles, expected);
}

TEST_F(PeerCommunicatorTest, NoRankConnectsWhenOneCannotReachTheOthers) {
  states_[1].connect = absl::FailedPreconditionError("rank 2 is out of reach");
  const auto statuses = Run(Nothing);
  EXPECT_EQ(statuses[1].message(), "rank 2 is out of reach");
  EXPECT_EQ(statuses[0].code(), absl::StatusCode::kAborted) << statuses[0];
  EXPECT_EQ(statuses[2].code(), absl::StatusCode::kAborted) << statuses[2];
}

TEST_F(PeerCommunicatorTest, NoRankConnectsWhenOneHasNoMemoryToShare) {
  states_[2].open = absl::ResourceExhaustedError("no room");
  const auto statuses = Run(Nothing);
  EXPECT_EQ(statuses[2].message(), "no room");
  EXPECT_TRUE(absl::StrContains(statuses[0].message(), "rank 2")) << statuses[0];
  EXPECT_TRUE(absl::StrContains(statuses[1].message(), "rank 2")) << statuses[1];
}

TEST_F(PeerCommunicatorTest, ASilentRankIsNamedInAllLaterCalls) {
  const auto statuses = Run([&](GroupCommunicator& communicator) {
    float value = 1.0f;
    const Tensor tensor(&value, DType::kF32, {1});
    RETURN_IF_ERROR(communicator.AllReduceSum(tensor));
    EXPECT_TRUE(communicator.status().ok());
    states_[communicator.rank()].fault = {.kind = PeerFault::Kind::kTimedOut, .silent_rank = 1};
    EXPECT_EQ(communicator.AllReduceSum(tensor), communicator.status());
    EXPECT_EQ(communicator.BroadcastFromRank0(&value, 4), communicator.status());
    return communicator.status();
  });
  for (const absl::Status& status : statuses) {
    EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), "for rank 1")) << status;
  }
  for (const FakeState& state : states_) EXPECT_EQ(state.num_sums, 1);
}

TEST_F(PeerCommunicatorTest, AbortReachesTheDevice) {
  const auto statuses = Run([&](GroupCommunicator& communicator) {
    communicator.Abort();
    EXPECT_TRUE(states_[communicator.rank()].is_aborted);
    return communicator.status();
  });
  for (const absl::Status& status : statuses) {
    EXPECT_EQ(status.code(), absl::StatusCode::kAborted) << status;
  }
}

TEST_F(PeerCommunicatorTest, ARankThatIsGoneTakesAWaitingBroadcastAlong) {
  const auto statuses = Run([&](GroupCommunicator& communicator) {
    if (communicator.rank() == 0) communicator.Abort();
    char byte = 0;
    return communicator.BroadcastFromRank0(&byte, 1);
  });
  for (const absl::Status& status : statuses) EXPECT_FALSE(status.ok());
  for (const FakeState& state : states_) EXPECT_TRUE(state.is_aborted);
}

TEST(PeerMemoryTest, TheCpuHasNone) {
  const auto device = *OpenCpuDevice({});
  EXPECT_EQ(device->OpenPeerMemory({}).status().code(), absl::StatusCode::kUnimplemented);
}

// --- processes on one GPU: without MPS their kernels take turns, some milliseconds each

enum class Gpus { kShared, kOneEach };

// Opens the GPU in the rank's own process.
class GpuRanks {
 public:
  static MakeCommunicator Maker(absl::Duration timeout = absl::Seconds(20),
                                Gpus gpus = Gpus::kShared) {
    return [=](int rank, int world_size) -> std::unique_ptr<GroupCommunicator> {
      // Lives as long as the process.
      device() =
          new std::unique_ptr<Device>(*OpenCudaDevice({.gpu = gpus == Gpus::kOneEach ? rank : 0}));
      return MakeOn(**device(), rank, world_size, timeout);
    };
  }
  static std::unique_ptr<Device>*& device() {
    static std::unique_ptr<Device>* device = nullptr;
    return device;
  }
};

class PeerCommunicatorGpuTest : public testing::Test {
 protected:
  // In other processes, since this one forks and may not have touched the GPU.
  static absl::Status Need(int num_gpus) {
    const auto probe = RunInProcesses(
        num_gpus,
        [](int rank, int world_size) {
          return MakeShmCommunicator({.rank = rank, .world_size = world_size});
        },
        [](GroupCommunicator& host) { return OpenCudaDevice({.gpu = host.rank()}).status(); });
    for (const absl::Status& status : probe) RETURN_IF_ERROR(status);
    return absl::OkStatus();
  }
  void SetUp() override {
    if (const absl::Status need = Need(1); !need.ok()) GTEST_SKIP() << need.message();
  }
};

absl::Status SumAndCompare(Communicator& communicator, int64_t count) {
  Device& device = **GpuRanks::device();
  ASSIGN_OR_RETURN(const Buffer memory, device.Allocate(count * 4));
  const Tensor tensor(memory.data(), DType::kF32, {count});
  const auto value_of = [](int rank, int64_t i) {
    return static_cast<float>((i * 31 + rank * 17) % 1001) / 7.0f - static_cast<float>(rank) * 99;
  };
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = value_of(communicator.rank(), i);
  device.CopyFromHost(values.data(), tensor);
  RETURN_IF_ERROR(communicator.AllReduceSum(tensor));
  device.CopyToHost(tensor, values.data());
  RETURN_IF_ERROR(communicator.status());
  for (int64_t i = 0; i < count; ++i) {
    float expected = value_of(0, i);
    for (int rank = 1; rank < communicator.world_size(); ++rank) expected += value_of(rank, i);
    if (values[i] != expected) {
      return absl::InternalError(
          absl::StrCat("of ", count, ", [", i, "] is ", values[i], ", expected ", expected));
    }
  }
  return absl::OkStatus();
}

absl::Status GatherAndCompare(Communicator& communicator, int64_t count) {
  Device& device = **GpuRanks::device();
  ASSIGN_OR_RETURN(const Buffer part, device.Allocate(count * 4));
  ASSIGN_OR_RETURN(const Buffer whole, device.Allocate(communicator.world_size() * count * 4));
  std::vector<int32_t> values(count, communicator.rank() * 1000 + 7);
  const Tensor part_tensor(part.data(), DType::kI32, {count});
  const Tensor whole_tensor(whole.data(), DType::kI32, {communicator.world_size(), count});
  device.CopyFromHost(values.data(), part_tensor);
  RETURN_IF_ERROR(
      communicator.GatherToRank0(part_tensor, communicator.rank() == 0 ? whole_tensor : Tensor()));
  std::vector<int32_t> found(communicator.world_size() * count);
  device.CopyToHost(whole_tensor, found.data());
  RETURN_IF_ERROR(communicator.status());
  if (communicator.rank() != 0) return absl::OkStatus();
  for (size_t i = 0; i < found.size(); ++i) {
    const auto rank = static_cast<int32_t>(static_cast<int64_t>(i) / count);
    if (found[i] != rank * 1000 + 7) return absl::InternalError(absl::StrCat("gathered [", i, "]"));
  }
  return absl::OkStatus();
}

absl::Status UseEverything(GroupCommunicator& communicator) {
  for (const int64_t count : {1, 7168, 300'000, 3'000'000, 64}) {
    RETURN_IF_ERROR(SumAndCompare(communicator, count));
    RETURN_IF_ERROR(GatherAndCompare(communicator, count));
    int32_t token = communicator.rank() == 0 ? 4711 : 0;
    RETURN_IF_ERROR(communicator.BroadcastFromRank0(&token, sizeof token));
    if (token != 4711) return absl::InternalError("broadcast differs");
  }
  return absl::OkStatus();
}

TEST_F(PeerCommunicatorGpuTest, ProcessesOnOneGpuSumAndGather) {
  for (const int world_size : {2, 4}) {
    const absl::Time start = absl::Now();
    const auto statuses = RunInProcesses(world_size, GpuRanks::Maker(), UseEverything);
    for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
    std::printf("%d processes: %.2f s\n", world_size, absl::ToDoubleSeconds(absl::Now() - start));
  }
}

// What stands between two halves of a layer, fused for one token and in two kernels for many, as a
// recording that is replayed.
absl::Status RecordAndReplay(Communicator& communicator, int64_t rows) {
  constexpr int64_t kColumns = 7168;
  constexpr int kReplays = 5;
  Device& device = **GpuRanks::device();
  const int64_t bytes = rows * kColumns * 2;
  ASSIGN_OR_RETURN(const Buffer memory, device.Allocate(4 * bytes + kColumns * 2));
  char* const begin = static_cast<char*>(memory.data());
  const auto tensor = [&](int i) {
    return Tensor(begin + i * bytes, DType::kBF16, {rows, kColumns});
  };
  const Tensor given = tensor(0), partial = tensor(1), residual = tensor(2), normed = tensor(3);
  const Tensor weight(begin + 4 * bytes, DType::kBF16, {kColumns});
  const auto fill = [&](const Tensor& target, float value) {
    const std::vector<BFloat16> values(target.num_elements(), ToBFloat16(value));
    device.CopyFromHost(values.data(), target);
  };
  fill(given, static_cast<float>(communicator.rank() + 1));
  fill(residual, 0.0f);
  fill(weight, 1.0f);
  ASSIGN_OR_RETURN(const std::unique_ptr<Recording> recording, device.Record([&] {
    device.Copy(given, partial);
    return communicator.AllReduceAddRmsNorm(device.ops(), partial, residual, weight, 1e-6f, normed,
                                            {});
  }));
  for (int i = 0; i < kReplays; ++i) recording->Replay();
  std::vector<BFloat16> sums(rows * kColumns), norms(rows * kColumns);
  device.CopyToHost(residual, sums.data());
  device.CopyToHost(normed, norms.data());
  RETURN_IF_ERROR(communicator.status());
  const int world = communicator.world_size();
  const auto expected = static_cast<float>(kReplays * world * (world + 1) / 2);
  for (size_t i = 0; i < sums.size(); ++i) {  // small whole numbers, and equal ones: all exact
    if (ToFloat(sums[i]) != expected || ToFloat(norms[i]) != 1.0f) {
      return absl::InternalError(absl::StrCat("[", i, "] of ", rows, " rows is ", ToFloat(sums[i]),
                                              ", normed ", ToFloat(norms[i])));
    }
  }
  return absl::OkStatus();
}

TEST_F(PeerCommunicatorGpuTest, ProcessesReplayRecordedSums) {
  const auto statuses =
      RunInProcesses(2, GpuRanks::Maker(), [](GroupCommunicator& communicator) -> absl::Status {
        if (!communicator.is_recordable()) return absl::InternalError("cannot be recorded");
        RETURN_IF_ERROR(RecordAndReplay(communicator, 1));
        RETURN_IF_ERROR(RecordAndReplay(communicator, 200));
        return RecordAndReplay(communicator, 9);
      });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

TEST_F(PeerCommunicatorGpuTest, ProcessesOnGpusOfTheirOwnSumGatherAndReplay) {
  if (const absl::Status need = Need(2); !need.ok()) GTEST_SKIP() << need.message();
  const auto statuses = RunInProcesses(2, GpuRanks::Maker(absl::Seconds(20), Gpus::kOneEach),
                                       [](GroupCommunicator& communicator) -> absl::Status {
                                         RETURN_IF_ERROR(UseEverything(communicator));
                                         for (const int64_t rows : {1, 9, 64, 200}) {
                                           RETURN_IF_ERROR(RecordAndReplay(communicator, rows));
                                         }
                                         return absl::OkStatus();
                                       });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

TEST_F(PeerCommunicatorGpuTest, AKilledProcessIsNamedAfterTheTimeout) {
  const auto statuses =
      RunInProcesses(3, GpuRanks::Maker(absl::Seconds(1)), [](GroupCommunicator& communicator) {
        for (int round = 0; round < 50; ++round) {
          if (communicator.rank() == 2 && round == 17) raise(SIGKILL);
          RETURN_IF_ERROR(SumAndCompare(communicator, 100));
        }
        return absl::OkStatus();
      });
  EXPECT_EQ(statuses[2].code(), absl::StatusCode::kUnknown);
  for (const int rank : {0, 1}) {
    EXPECT_EQ(statuses[rank].code(), absl::StatusCode::kDeadlineExceeded) << statuses[rank];
    EXPECT_TRUE(absl::StrContains(statuses[rank].message(), "in vain for rank ")) << statuses[rank];
  }
}

TEST_F(PeerCommunicatorGpuTest, AnAbortedRankStopsWaitingAtOnce) {
  const auto statuses =
      RunInProcesses(2, GpuRanks::Maker(absl::Seconds(100)), [](GroupCommunicator& communicator) {
        RETURN_IF_ERROR(SumAndCompare(communicator, 100));
        if (communicator.rank() == 1) {
          absl::SleepFor(absl::Seconds(1));
          return absl::OkStatus();
        }
        std::thread aborter([&] {
          absl::SleepFor(absl::Milliseconds(200));
          communicator.Abort();
        });
        const absl::Time start = absl::Now();
        const absl::Status status = SumAndCompare(communicator, 100);
        aborter.join();
        std::printf("ended %.0f ms after an abort at 200\n",
                    absl::ToDoubleMilliseconds(absl::Now() - start));
        return status;
      });
  EXPECT_EQ(statuses[0].code(), absl::StatusCode::kAborted) << statuses[0];
}

}  // namespace
}  // namespace fathom
