#include "deploy/launcher/restart_backoff.h"

#include "gtest/gtest.h"

namespace fathom {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

TEST(RestartBackoffTest, DoublesUpToALimitWhileTheProcessDiesYoung) {
  RestartBackoff backoff({});
  for (const int expected : {100, 200, 400, 800, 1600, 3200, 5000, 5000}) {
    EXPECT_EQ(backoff.NextDelay(seconds(1)), milliseconds(expected));
  }
}

TEST(RestartBackoffTest, ForgivesAfterALongLife) {
  RestartBackoff backoff({});
  backoff.NextDelay(seconds(0));
  backoff.NextDelay(seconds(0));
  EXPECT_EQ(backoff.NextDelay(seconds(30)), milliseconds(100));
  EXPECT_EQ(backoff.NextDelay(seconds(29)), milliseconds(200));
}

}  // namespace
}  // namespace fathom
