// Vocabulary of the conformance tests: tensors that exist twice, on the CPU and on the GPU, with
// the same contents; operations run on both, and what they wrote is compared.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "kernels/device.h"
#include "kernels/ops.h"
#include "tests/kernels/test_tensor.h"

namespace fathom {

// The same view of both copies.
struct Twin {
  Tensor cpu;
  Tensor gpu;

  Twin Slice(int dimension, int64_t begin, int64_t end) const {
    return {cpu.Slice(dimension, begin, end), gpu.Slice(dimension, begin, end)};
  }
  Twin SplitLast(int64_t outer, int64_t inner) const {
    return {cpu.SplitLast(outer, inner), gpu.SplitLast(outer, inner)};
  }
  Twin Reshape(std::initializer_list<int64_t> shape) const {
    return {cpu.Reshape(shape), gpu.Reshape(shape)};
  }
};

struct TwinWeight {
  Weight cpu;
  Weight gpu;
};

struct TwinGroups {
  Twin rows, offsets;
  ExpertGroups cpu() const { return {.rows = rows.cpu, .offsets = offsets.cpu}; }
  ExpertGroups gpu() const { return {.rows = rows.gpu, .offsets = offsets.gpu}; }
};

// The absolute values of a dense tensor's elements.
inline TestTensor Absolute(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  TestTensor absolute(tensor.dtype(), shape);
  for (int64_t i = 0; i < tensor.num_elements(); ++i) {
    SetElement(absolute, i, std::abs(static_cast<float>(ElementAt(tensor, i))));
  }
  return absolute;
}

// Skips where there is no GPU.
class TwinTest : public testing::Test {
 protected:
  void SetUp() override {
    absl::StatusOr<std::unique_ptr<Device>> gpu = OpenCudaDevice({});
    if (!gpu.ok()) GTEST_SKIP() << gpu.status().message();
    gpu_device_ = *std::move(gpu);
    std::printf("seed %d\n", static_cast<int>(kSeed));
  }

  Ops& cpu() { return cpu_device_->ops(); }
  Ops& gpu() { return gpu_device_->ops(); }

  Twin Of(const TestTensor& values) {
    cpu_memory_.push_back(values);
    Buffer& buffer = gpu_memory_.emplace_back(*gpu_device_->Allocate(values->num_bytes()));
    // The shape of `values`, over other memory.
    Tensor copy = values;
    copy = Rebase(copy, buffer.data());
    gpu_device_->CopyFromHost(values->raw(), copy);
    return {values, copy};
  }
  Twin Floats(DType dtype, std::initializer_list<int64_t> shape, float deviation = 1.0f) {
    return Of(random_.Floats(dtype, shape, deviation));
  }
  // [rows, columns] within rows that are `gap` elements longer.
  Twin Strided(DType dtype, int64_t rows, int64_t columns, int64_t gap) {
    return Floats(dtype, {rows, columns + gap}).Slice(1, gap / 2, gap / 2 + columns);
  }
  Twin Ints(std::initializer_list<int64_t> shape, int limit) {
    return Of(random_.Ints(shape, limit));
  }

  // Element i of the GPU's copy, and of the CPU's, for all i in the order of a dense tensor.
  using Bound = std::function<double(int64_t i, double cpu_value)>;
  void ExpectWithin(const Twin& twin, const Bound& bound) {
    const std::vector<double> found = OnHost(twin.gpu), expected = Values(twin.cpu);
    int num_wrong = 0;
    for (size_t i = 0; i < expected.size() && num_wrong < 5; ++i) {
      if (std::isnan(expected[i]) && std::isnan(found[i])) continue;
      const double error = bound(static_cast<int64_t>(i), expected[i]);
      const bool is_right = std::abs(found[i] - expected[i]) <= error;  // false for one NaN
      EXPECT_TRUE(is_right) << "element " << i << " of " << twin.cpu.DebugString() << ": "
                            << found[i] << ", expected " << expected[i] << " +- " << error;
      num_wrong += !is_right;
    }
  }
  void ExpectEqual(const Twin& twin) {
    ExpectWithin(twin, [](int64_t, double) { return 0.0; });
  }
  // `units` roundings to F32 on either side, and one to the tensor's own type.
  void ExpectWithinUnits(const Twin& twin, double units) {
    const double relative = 2 * units * kFloatRoundoff + OwnRounding(twin.cpu.dtype());
    ExpectWithin(twin, [relative](int64_t, double value) { return relative * std::abs(value); });
  }

  // What two roundings to a type can add to a difference, relative. Nothing for F32, whose
  // roundings are counted.
  static double OwnRounding(DType dtype) {
    return dtype == DType::kBF16 ? 2 * RoundoffOf(DType::kBF16) : 0.0;
  }

  std::vector<double> OnHost(const Tensor& gpu_tensor) {
    std::vector<char> bytes(static_cast<size_t>(gpu_tensor.num_bytes()));
    gpu_device_->CopyToHost(gpu_tensor, bytes.data());
    std::vector<double> values(static_cast<size_t>(gpu_tensor.num_elements()));
    const Tensor host(bytes.data(), gpu_tensor.dtype(), {gpu_tensor.num_elements()});
    for (size_t i = 0; i < values.size(); ++i) values[i] = ElementAt(host, static_cast<int64_t>(i));
    return values;
  }

  static constexpr uint64_t kSeed = 20261123;
  Random random_{kSeed};
  std::unique_ptr<Device> cpu_device_ = OpenTestDevice(2);
  std::unique_ptr<Device> gpu_device_;

 private:
  static Tensor Rebase(const Tensor& tensor, void* data) {
    const auto size = [&](int i) { return tensor.dim(i); };
    switch (tensor.rank()) {
      case 1:
        return Tensor(data, tensor.dtype(), {size(0)});
      case 2:
        return Tensor(data, tensor.dtype(), {size(0), size(1)});
      default:
        return Tensor(data, tensor.dtype(), {size(0), size(1), size(2)});
    }
  }
  static std::vector<double> Values(const Tensor& tensor) {
    std::vector<double> values;
    if (tensor.rank() == 1) {
      for (int64_t i = 0; i < tensor.dim(0); ++i) values.push_back(At(tensor, i));
      return values;
    }
    for (int64_t i = 0; i < tensor.dim(0); ++i) {
      const std::vector<double> row = Values(tensor[i]);
      values.insert(values.end(), row.begin(), row.end());
    }
    return values;
  }

  std::list<TestTensor> cpu_memory_;
  std::list<Buffer> gpu_memory_;
};

}  // namespace fathom
