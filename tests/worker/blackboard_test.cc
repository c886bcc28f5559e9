#include "worker/blackboard.h"

#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

absl::Time Soon() { return absl::Now() + absl::Milliseconds(10); }
absl::Time Late() { return absl::Now() + absl::Seconds(30); }

TEST(BlackboardKeeperTest, GivesWhatWasPublishedUnderTheSameEpochOnly) {
  BlackboardKeeper keeper;
  ASSERT_TRUE(keeper.Publish(3, "key", "three").ok());
  ASSERT_TRUE(keeper.Publish(4, "key", "four").ok());
  EXPECT_EQ(*keeper.Lookup(3, "key", Soon()), "three");
  EXPECT_EQ(*keeper.Lookup(4, "key", Soon()), "four");
  EXPECT_EQ(keeper.Lookup(5, "key", Soon()).status().code(), absl::StatusCode::kDeadlineExceeded);
}

TEST(BlackboardKeeperTest, LookupWaitsForTheValue) {
  BlackboardKeeper keeper;
  std::thread reader([&] { EXPECT_EQ(*keeper.Lookup(1, "key", Late()), "value"); });
  EXPECT_TRUE(keeper.Publish(1, "key", "value").ok());
  reader.join();
}

TEST(BlackboardKeeperTest, ANewEpochEndsWaitingForOldOnes) {
  BlackboardKeeper keeper;
  ASSERT_TRUE(keeper.Publish(1, "key", "value").ok());
  std::thread reader([&] {
    EXPECT_EQ(keeper.Lookup(1, "other", Late()).status().code(),
              absl::StatusCode::kFailedPrecondition);
  });
  keeper.BeginEpoch(2);
  reader.join();
  EXPECT_EQ(keeper.Lookup(1, "key", Soon()).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(keeper.Publish(1, "key", "value").code(), absl::StatusCode::kFailedPrecondition);
}

TEST(BlackboardKeeperTest, WhatIsPublishedForALaterEpochIsKeptForIt) {
  BlackboardKeeper keeper;
  ASSERT_TRUE(keeper.Publish(2, "key", "value").ok());
  keeper.BeginEpoch(2);
  EXPECT_EQ(*keeper.Lookup(2, "key", Soon()), "value");
}

TEST(BlackboardKeeperTest, PublishingTwiceIsFineWithTheSameValueOnly) {
  BlackboardKeeper keeper;
  EXPECT_TRUE(keeper.Publish(1, "key", "value").ok());
  EXPECT_TRUE(keeper.Publish(1, "key", "value").ok());
  EXPECT_EQ(keeper.Publish(1, "key", "other").code(), absl::StatusCode::kAlreadyExists);
}

TEST(BlackboardKeeperTest, HoldsALimitedAmount) {
  BlackboardKeeper keeper;
  EXPECT_EQ(keeper.Publish(1, "key", std::string(BlackboardKeeper::kMaxValueBytes, 'x')).code(),
            absl::StatusCode::kResourceExhausted);
  for (size_t i = 0; i < BlackboardKeeper::kMaxEntries; ++i) {
    ASSERT_TRUE(keeper.Publish(1, absl::StrCat(i), "").ok());
  }
  EXPECT_EQ(keeper.Publish(1, "key", "").code(), absl::StatusCode::kResourceExhausted);
  keeper.BeginEpoch(2);
  EXPECT_TRUE(keeper.Publish(2, "key", "").ok());
}

TEST(BlackboardKeeperTest, ClosingEndsAllWaiting) {
  BlackboardKeeper keeper;
  std::thread reader([&] {
    EXPECT_EQ(keeper.Lookup(1, "key", Late()).status().code(), absl::StatusCode::kUnavailable);
  });
  keeper.Close();
  reader.join();
}

}  // namespace
}  // namespace fathom
