#include "kernels/cuda/cuda_check.h"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <string>

#include "kernels/cuda/all_reduce.h"
#include "kernels/cuda/cuda_ops.h"

namespace fathom {
namespace {

TEST(CudaCheckTest, SaysWhatFailedWhereAndWhatToDoInOneLine) {
  const std::string line =
      DescribeCudaFailure("kernels/x.cc", 7, "cudaMalloc(&p, n)", cudaErrorMemoryAllocation);
  EXPECT_EQ(line,
            "the GPU failed: out of memory (cudaErrorMemoryAllocation) in cudaMalloc(&p, n) at "
            "kernels/x.cc:7; the GPU's memory is full: try decreasing --gpu-memory-utilization, or "
            "end what else uses the GPU");
  for (const cudaError_t error : {cudaErrorIllegalAddress, cudaErrorECCUncorrectable,
                                  cudaErrorInsufficientDriver, cudaErrorMpsClientTerminated}) {
    const std::string other = DescribeCudaFailure("x.cc", 7, "f()", error);
    EXPECT_EQ(other.find('\n'), std::string::npos) << other;
    EXPECT_NE(other.find(cudaGetErrorName(error)), std::string::npos) << other;
  }
}

TEST(CudaCheckTest, EndsTheProcessWithACodeOfItsOwn) {
  testing::GTEST_FLAG(death_test_style) = "threadsafe";  // CUDA has threads
  EXPECT_EXIT(
      CUDA_CHECK(cudaErrorIllegalAddress), testing::ExitedWithCode(kExitGpuFailed),
      "^the GPU failed: an illegal memory access was encountered .*cuda_check_test.cc.*\n$");
}

// Faults of the device itself, each in a process of its own.
class CudaFaultTest : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no GPU here";
    testing::GTEST_FLAG(death_test_style) = "threadsafe";  // forks before CUDA begins
  }
};

TEST_F(CudaFaultTest, AnIllegalAddressInAKernelEndsTheProcessInOneLine) {
  const auto sum_into_nowhere = [] {
    void* window = nullptr;
    CUDA_CHECK(cudaMalloc(&window, cuda::kPeerWindowBytes));
    CUDA_CHECK(cudaMemset(window, 0, cuda::kPeerWindowBytes));
    cuda::PeerGroup group{.rank = 0, .world_size = 2};
    group.windows[0] = static_cast<char*>(window);
    group.windows[1] = reinterpret_cast<char*>(0x1000);
    cuda::AllReduceSum(group, window, DType::kF32, 1000, nullptr);
    CUDA_CHECK(cudaDeviceSynchronize());
  };
  EXPECT_EXIT(sum_into_nowhere(), testing::ExitedWithCode(kExitGpuFailed),
              "^the GPU failed: .* in cudaDeviceSynchronize\\(\\) at .*Xid.*\n$");
}

TEST_F(CudaFaultTest, MemoryThatIsNotThereEndsTheProcessInOneLine) {
  EXPECT_EXIT(GrowingMemory().Reserve(int64_t{1} << 50), testing::ExitedWithCode(kExitGpuFailed),
              "^the GPU failed: out of memory .*--gpu-memory-utilization.*\n$");
}

}  // namespace
}  // namespace fathom
