#include "kernels/cuda/gpu_choice.h"

#include <gtest/gtest.h>

#include "absl/strings/match.h"

namespace fathom {
namespace {

TEST(GpuChoiceTest, TheChosenOneComesFirstAndTheOthersStay) {
  EXPECT_EQ(*VisibleDevicesFrom("4,5,GPU-8932f937,7", 2), "GPU-8932f937,4,5,7");
  EXPECT_EQ(*VisibleDevicesFrom("4", 0), "4");
  EXPECT_TRUE(absl::StartsWith(*VisibleDevicesFrom(std::nullopt, 3), "3,0,1,2,4,5,6,7,"));
}

TEST(GpuChoiceTest, ANumberBeyondWhatIsShownIsRefusedWithTheirCount) {
  const absl::Status status = VisibleDevicesFrom("0,1", 2).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(status.message(), "there is no GPU 2: CUDA_VISIBLE_DEVICES='0,1' shows 2, 0 to 1");
  EXPECT_TRUE(absl::StrContains(VisibleDevicesFrom("", 0).status().message(), "shows none"));
}

}  // namespace
}  // namespace fathom
