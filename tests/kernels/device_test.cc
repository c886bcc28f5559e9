#include "kernels/device.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/ops.h"

namespace fathom {
namespace {

using testing::HasSubstr;

class CpuDeviceTest : public testing::Test {
 protected:
  std::unique_ptr<Device> device_ = *OpenCpuDevice({});
};

TEST_F(CpuDeviceTest, GivesAlignedMemoryOfZeros) {
  for (int64_t num_bytes : {1, 63, 4097, 1 << 17, 5 << 20}) {
    const Buffer buffer = *device_->Allocate(num_bytes);
    EXPECT_EQ(buffer.num_bytes(), num_bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 64, 0u);
    const char* bytes = static_cast<const char*>(buffer.data());
    EXPECT_TRUE(std::all_of(bytes, bytes + num_bytes, [](char byte) { return byte == 0; }));
  }
  EXPECT_EQ(device_->Allocate(0)->num_bytes(), 0);
}

TEST_F(CpuDeviceTest, RefusesMoreThanThereIs) {
  const int64_t available_bytes = device_->AvailableBytes();
  EXPECT_GT(available_bytes, 0);
  const auto buffer = device_->Allocate(int64_t{1} << 55);
  EXPECT_EQ(buffer.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(buffer.status().message(), HasSubstr("36028797018963968 bytes"));
}

TEST_F(CpuDeviceTest, CopiesStridedTensors) {
  Buffer buffer = *device_->Allocate(4 * 24);
  const Tensor matrix(buffer.data(), DType::kI32, {4, 6});
  const Tensor columns = matrix.Slice(1, 1, 3);
  const std::vector<int32_t> values = {1, 2, 3, 4, 5, 6, 7, 8};
  device_->CopyFromHost(values.data(), columns);
  EXPECT_EQ(matrix.data<int32_t>()[0], 0);
  EXPECT_EQ(matrix.data<int32_t>()[7], 3);
  EXPECT_EQ(matrix.data<int32_t>()[9], 0);
  std::vector<int32_t> back(8);
  device_->CopyToHost(columns, back.data());
  EXPECT_EQ(back, values);
}

TEST_F(CpuDeviceTest, MovesItsBuffers) {
  Buffer buffer = *device_->Allocate(1 << 20);
  void* data = buffer.data();
  Buffer other = std::move(buffer);
  EXPECT_EQ(other.data(), data);
  EXPECT_EQ(buffer.data(), nullptr);
}

TEST(DeviceTest, SaysWhatIsWrongWithItsOptions) {
  EXPECT_EQ(OpenCpuDevice({.num_threads = 0}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(DeviceTest, SaysThatThisBuildHasNoCuda) {
  const auto device = OpenCudaDevice({});
  if (device.ok()) GTEST_SKIP() << "this build has CUDA";
  EXPECT_EQ(device.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(device.status().message(), HasSubstr("--device cpu"));
}

}  // namespace
}  // namespace fathom
