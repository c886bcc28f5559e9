#include "coordinator/worker_group.h"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr uint64_t kEpoch = 7;
constexpr absl::Duration kTimeout = absl::Seconds(10);

class RecordingTransport final : public WorkerGroup::Transport {
 public:
  explicit RecordingTransport(std::vector<uint64_t>& steps) : steps_(steps) {}
  void Send(const v1::StepCommand& command) override { steps_.push_back(command.step()); }

 private:
  std::vector<uint64_t>& steps_;
};

class WorkerGroupTest : public ::testing::Test {
 protected:
  WorkerGroupTest()
      : group_({.epoch = kEpoch,
                .plan = {},
                .worker_names = {"worker 0", "worker 1"},
                .step_timeout = kTimeout},
               [this] { ++num_events_; }) {
    group_.Connect(std::make_unique<RecordingTransport>(sent_));
  }

  void Send(uint64_t step, absl::Duration now = {}) {
    v1::StepCommand command;
    command.set_epoch(kEpoch);
    command.set_step(step);
    group_.Send(command, now);
  }
  void Answer(int rank, uint64_t step, uint64_t epoch = kEpoch) {
    v1::StepResult result;
    result.set_epoch(epoch);
    result.set_step(step);
    result.set_compute_us(100 + rank);
    group_.OnResult(rank, std::move(result));
  }
  std::string Failure(absl::Duration now = {}) { return std::string(group_.Check(now).message()); }

  std::vector<uint64_t> sent_;
  int num_events_ = 0;
  WorkerGroup group_;
};

TEST_F(WorkerGroupTest, GivesTheResultOfRank0OnceAllHaveAnswered) {
  Send(1);
  Send(2);
  EXPECT_THAT(sent_, ElementsAre(1, 2));
  Answer(0, 1);
  Answer(0, 2);
  EXPECT_EQ(group_.TakeResult({}), std::nullopt);
  EXPECT_EQ(num_events_, 0);
  Answer(1, 1);
  EXPECT_EQ(num_events_, 1);
  const auto result = group_.TakeResult({});
  ASSERT_TRUE(result.has_value());
  EXPECT_EQ(result->step(), 1u);
  EXPECT_EQ(result->compute_us(), 100u);
  EXPECT_EQ(group_.TakeResult({}), std::nullopt);
  EXPECT_TRUE(group_.Check({}).ok());
}

TEST_F(WorkerGroupTest, SaysWhoIsSilentAndDoesNotBreak) {
  group_.OnSilence(1, true);
  EXPECT_EQ(group_.SilentWorkers(), "worker 1");
  group_.OnSilence(0, true);
  EXPECT_EQ(group_.SilentWorkers(), "worker 0, worker 1");
  EXPECT_TRUE(group_.Check({}).ok());
  group_.OnSilence(0, false);
  group_.OnSilence(1, false);
  EXPECT_EQ(group_.SilentWorkers(), "");
  EXPECT_EQ(num_events_, 4);
}

TEST_F(WorkerGroupTest, BreaksWhenAnAnswerIsOutOfTurn) {
  Send(1);
  Answer(1, 1);
  EXPECT_TRUE(group_.Check({}).ok());
  Answer(1, 1);
  EXPECT_EQ(Failure(), "worker 1 answered step 1 of epoch 7 out of turn");
}

TEST_F(WorkerGroupTest, BreaksWhenAnAnswerIsOfAnotherEpoch) {
  Send(1);
  Answer(0, 1, kEpoch - 1);
  EXPECT_EQ(Failure(), "worker 0 answered step 1 of epoch 6 out of turn");
}

TEST_F(WorkerGroupTest, BreaksWhenAStepIsAnsweredThatWasNotSent) {
  Answer(0, 1);
  EXPECT_EQ(Failure(), "worker 0 answered step 1 of epoch 7 out of turn");
}

TEST_F(WorkerGroupTest, NamesWhoIsSilentPastTheDeadline) {
  Send(1, absl::Seconds(1));
  EXPECT_EQ(group_.deadline(), absl::Seconds(11));
  Send(2, absl::Seconds(3));
  Answer(0, 1);
  Answer(1, 1);
  ASSERT_TRUE(group_.TakeResult(absl::Seconds(5)).has_value());
  EXPECT_EQ(group_.deadline(), absl::Seconds(15)) << "counted from when its turn came";
  Answer(0, 2);
  EXPECT_TRUE(group_.Check(absl::Seconds(14)).ok());
  EXPECT_EQ(Failure(absl::Seconds(15)), "worker 1 did not finish step 2 within 10s");
  EXPECT_EQ(group_.Cause(absl::Seconds(15))->message(), Failure());
}

TEST_F(WorkerGroupTest, HasNoDeadlineWhileNothingIsInFlight) {
  EXPECT_EQ(group_.deadline(), absl::InfiniteDuration());
  Send(1);
  Answer(0, 1);
  Answer(1, 1);
  ASSERT_TRUE(group_.TakeResult({}).has_value());
  EXPECT_EQ(group_.deadline(), absl::InfiniteDuration());
  EXPECT_TRUE(group_.Check(absl::Hours(1)).ok());
}

TEST_F(WorkerGroupTest, BlamesTheLostWorkerAndNotWhoFailedForItsAbsence) {
  Send(1);
  group_.OnStreamEnded(0, absl::AbortedError("rank 1 is gone"));
  EXPECT_THAT(Failure(absl::Seconds(1)), HasSubstr("worker 0 failed"));
  EXPECT_EQ(group_.Cause(absl::Seconds(1)), std::nullopt);
  EXPECT_LT(group_.deadline(), absl::Seconds(2));
  group_.OnStreamEnded(1, absl::UnavailableError("connection reset"));
  EXPECT_EQ(group_.Cause(absl::Seconds(1))->message(), "worker 1 was lost: connection reset");
}

TEST_F(WorkerGroupTest, BlamesTheFirstToFailWhenNobodyIsLost) {
  group_.OnStreamEnded(1, absl::InternalError("out of luck"));
  EXPECT_FALSE(group_.Check(absl::Seconds(1)).ok());
  EXPECT_EQ(group_.Cause(absl::Seconds(1)), std::nullopt);
  EXPECT_EQ(group_.Cause(group_.deadline())->message(), "worker 1 failed: out of luck");
}

TEST_F(WorkerGroupTest, GivesACompleteResultThoughItHasBrokenSince) {
  Send(1);
  Answer(0, 1);
  Answer(1, 1);
  group_.OnStreamEnded(1, absl::UnavailableError("connection reset"));
  EXPECT_TRUE(group_.TakeResult({}).has_value());
  EXPECT_FALSE(group_.Check({}).ok());
}

}  // namespace
}  // namespace fathom
