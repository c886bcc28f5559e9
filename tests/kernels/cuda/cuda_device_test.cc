#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "kernels/device.h"

namespace fathom {
namespace {

using testing::HasSubstr;

class CudaDeviceTest : public testing::Test {
 protected:
  void SetUp() override {
    absl::StatusOr<std::unique_ptr<Device>> device = OpenCudaDevice({});
    if (!device.ok()) GTEST_SKIP() << device.status().message();
    device_ = *std::move(device);
  }

  std::unique_ptr<Device> device_;
};

TEST_F(CudaDeviceTest, GivesAlignedMemoryOfZeros) {
  for (const int64_t num_bytes : {1, 63, 4097, 5 << 20}) {
    const Buffer buffer = *device_->Allocate(num_bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 64, 0u);
    std::vector<char> bytes(num_bytes, 1);
    device_->CopyToHost(Tensor(buffer.data(), DType::kF8E4M3, {num_bytes}), bytes.data());
    EXPECT_TRUE(std::all_of(bytes.begin(), bytes.end(), [](char byte) { return byte == 0; }));
  }
  EXPECT_EQ(device_->Allocate(0)->num_bytes(), 0);
}

TEST_F(CudaDeviceTest, RefusesMoreThanThereIsAndGoesOn) {
  EXPECT_GT(device_->AvailableBytes(), 0);
  const auto buffer = device_->Allocate(int64_t{1} << 45);
  EXPECT_EQ(buffer.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(buffer.status().message(), HasSubstr("35184372088832 bytes"));
  EXPECT_TRUE(device_->Allocate(1 << 20).ok());
}

TEST_F(CudaDeviceTest, CopiesMoreThanItsStagingMemory) {
  std::vector<int32_t> values(12 << 20);
  std::iota(values.begin(), values.end(), 0);
  const auto size = static_cast<int64_t>(values.size());
  const Buffer buffer = *device_->Allocate(size * 4);
  const Tensor tensor(buffer.data(), DType::kI32, {size});
  device_->CopyFromHost(values.data(), tensor);
  std::vector<int32_t> back(values.size());
  device_->CopyToHost(tensor, back.data());
  EXPECT_EQ(back, values);
}

TEST_F(CudaDeviceTest, LeavesTheHostItsMemoryOnReturn) {
  const Buffer buffer = *device_->Allocate(1000 * 4);
  std::vector<int32_t> value(1);
  for (int32_t i = 0; i < 1000; ++i) {
    value[0] = i;
    device_->CopyFromHost(value.data(),
                          Tensor(static_cast<int32_t*>(buffer.data()) + i, DType::kI32, {1}));
  }
  std::vector<int32_t> back(1000), expected(1000);
  std::iota(expected.begin(), expected.end(), 0);
  device_->CopyToHost(Tensor(buffer.data(), DType::kI32, {1000}), back.data());
  EXPECT_EQ(back, expected);
}

TEST_F(CudaDeviceTest, CopiesStridedTensors) {
  const Buffer buffer = *device_->Allocate(4 * 24);
  const Tensor matrix(buffer.data(), DType::kI32, {4, 6});
  const std::vector<int32_t> values = {1, 2, 3, 4, 5, 6, 7, 8};
  device_->CopyFromHost(values.data(), matrix.Slice(1, 1, 3));
  std::vector<int32_t> back(8), whole(24);
  device_->CopyToHost(matrix.Slice(1, 1, 3), back.data());
  EXPECT_EQ(back, values);

  const Buffer other = *device_->Allocate(4 * 8);
  const Tensor dense(other.data(), DType::kI32, {4, 2});
  device_->CopyFromHost(values.data(), dense);
  device_->Copy(dense, matrix.Slice(1, 4, 6));
  device_->CopyToHost(matrix, whole.data());
  const std::vector<int32_t> kSecondRow = {0, 3, 4, 0, 3, 4};
  EXPECT_TRUE(std::equal(kSecondRow.begin(), kSecondRow.end(), whole.begin() + 6));
}

}  // namespace
}  // namespace fathom
