// What the tests of one Hopper kernel against double precision share: arrays of device memory, and
// a fixture that skips where the kernel cannot run and prints the seed of its random numbers.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/cuda_check.h"

namespace fathom {

// Owns device memory for `size` elements, at least one.
template <typename T>
class DeviceArray {
 public:
  // All bits set to begin with: NaN in every floating type.
  explicit DeviceArray(size_t size) : size_(size) {
    const size_t num_bytes = std::max<size_t>(1, size) * sizeof(T);
    CUDA_CHECK(cudaMalloc(&data_, num_bytes));
    CUDA_CHECK(cudaMemset(data_, 0xFF, num_bytes));
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    CUDA_CHECK(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* data() const { return data_; }
  std::vector<T> ToHost() const {
    std::vector<T> values(size_);
    CUDA_CHECK(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

// Kernel: a class with `static bool Supports(const cudaDeviceProp&)`.
template <typename Kernel>
class Sm90Test : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no GPU here";
    CUDA_CHECK(cudaGetDeviceProperties(&device_, 0));
    if (!Kernel::Supports(device_)) GTEST_SKIP() << device_.name << " is no Hopper";
    const unsigned seed = std::random_device{}();
    RecordProperty("seed", std::to_string(seed));
    std::printf("seed %u\n", seed);
    random_.seed(seed);
  }

  cudaDeviceProp device_ = {};
  std::mt19937 random_;
};

}  // namespace fathom
