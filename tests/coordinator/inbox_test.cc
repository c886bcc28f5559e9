#include "coordinator/inbox.h"

#include <memory>
#include <utility>

#include "coordinator/queue_rate.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/retry_after.h"

namespace fathom {
namespace {

using ::testing::HasSubstr;

LiveRequest Asking(int num_prompt_tokens) {
  auto request = std::make_shared<Request>();
  request->prompt_token_ids.assign(num_prompt_tokens, 3);
  return {.request = std::move(request), .stream = nullptr};
}

class InboxTest : public ::testing::Test {
 protected:
  void Start(Inbox::Limits limits) {
    inbox_ = std::make_unique<Inbox>(limits, [] {});
    inbox_->Open();
  }
  absl::Status Submit(int num_prompt_tokens) {
    return inbox_->Submit(Asking(num_prompt_tokens)).status();
  }

  std::unique_ptr<Inbox> inbox_;
};

TEST_F(InboxTest, IsFullWhenAsManyRequestsWaitAsMay) {
  Start({.max_requests = 2});
  EXPECT_TRUE(Submit(1).ok());
  EXPECT_TRUE(Submit(1).ok());
  const absl::Status full = Submit(1);
  EXPECT_TRUE(absl::IsResourceExhausted(full));
  EXPECT_THAT(std::string(full.message()), HasSubstr("2 requests are waiting"));
  EXPECT_TRUE(inbox_->Resume(Asking(1)).ok()) << "it was let in elsewhere";

  EXPECT_EQ(inbox_->Take().submissions.size(), 3u);
  EXPECT_FALSE(Submit(1).ok()) << "nobody said yet that they do not wait any more";
  inbox_->SetLoad({.num_requests = 1, .num_tokens = 1});
  EXPECT_TRUE(Submit(1).ok());
  EXPECT_FALSE(Submit(1).ok());
}

TEST_F(InboxTest, IsFullWhenAsManyTokensWaitAsMay) {
  Start({.max_requests = 100, .max_tokens = 1000});
  EXPECT_TRUE(Submit(5000).ok()) << "it waits alone";
  const absl::Status full = Submit(1);
  EXPECT_TRUE(absl::IsResourceExhausted(full));
  EXPECT_THAT(std::string(full.message()), HasSubstr("5000 tokens are waiting, and 1 more"));
  inbox_->Take();
  inbox_->SetLoad({.num_requests = 3, .num_tokens = 400});
  EXPECT_TRUE(Submit(600).ok());
  EXPECT_FALSE(Submit(1).ok());
}

TEST_F(InboxTest, SaysWhenToTryAgain) {
  Start({.max_requests = 3});
  const auto retry_after = [this](Inbox::Load load) {
    load.num_requests = 3;
    inbox_->SetLoad(load);
    return RetryAfterOf(Submit(1));
  };
  EXPECT_EQ(retry_after({.num_tokens = 5000}), 10) << "the rate is unknown";
  EXPECT_EQ(retry_after({.num_tokens = 5000, .tokens_per_second = 400}), 13);
  EXPECT_EQ(retry_after({.num_tokens = 5000, .tokens_per_second = 1e6}), 1);
  EXPECT_EQ(retry_after({.num_tokens = 5000, .tokens_per_second = 1e-3}), 600);
  EXPECT_EQ(RetryAfterOf(absl::UnavailableError("nothing was said")), std::nullopt);
}

TEST(QueueRateTest, IsTheMeanOfTheLastWhile) {
  QueueRate rate;
  int64_t num_tokens = 7;
  for (int second = 0; second < 100; ++second) {
    rate.Note(absl::Seconds(second), num_tokens, true);
    // Not known yet at first.
    EXPECT_NEAR(rate.tokens_per_second(), second == 0 ? 0 : 50, 1e-6);
    num_tokens += 50;
  }
  rate.Note(absl::Seconds(100), 0, true);  // with other workers it counts from 0 again
  EXPECT_NEAR(rate.tokens_per_second(), 50, 5);
  for (int second = 101; second < 300; ++second) rate.Note(absl::Seconds(second), 0, true);
  EXPECT_NEAR(rate.tokens_per_second(), 0, 1e-3);
}

TEST(QueueRateTest, TimeInWhichNobodyWaitsSaysNothing) {
  QueueRate rate;
  rate.Note(absl::Seconds(0), 0, false);
  rate.Note(absl::Seconds(100), 10, true);  // begun at once
  rate.Note(absl::Seconds(102), 110, false);
  EXPECT_NEAR(rate.tokens_per_second(), 50, 1e-6);
  rate.Note(absl::Seconds(500), 120, true);
  rate.Note(absl::Seconds(504), 320, true);
  EXPECT_NEAR(rate.tokens_per_second(), 50, 1e-6);
}

}  // namespace
}  // namespace fathom
