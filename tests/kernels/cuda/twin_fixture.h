// Vocabulary of the conformance tests: tensors that exist twice, on the CPU and on the GPU, with
// the same contents; operations run on both, and what they wrote is compared.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
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
#include "tests/kernels/reference.h"
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

// Rows that a linear layer reads.
struct TwinInput {
  TwinInput(const Twin& values) : values(values) {}
  TwinInput(const Twin& values, const Twin& scales) : values(values), scales(scales) {}
  LinearInput cpu() const { return {values.cpu, scales.cpu}; }
  LinearInput gpu() const { return {values.gpu, scales.gpu}; }

  Twin values, scales;
};

struct TwinGroups {
  Twin rows, offsets, notes;
  ExpertGroups cpu() const { return {rows.cpu, offsets.cpu, notes.cpu}; }
  ExpertGroups gpu() const { return {rows.gpu, offsets.gpu, notes.gpu}; }
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

  // A dense copy, of rank 1 or 2.
  TestTensor HostCopy(const Tensor& gpu_tensor) {
    TestTensor copy =
        gpu_tensor.rank() == 1
            ? TestTensor(gpu_tensor.dtype(), {gpu_tensor.dim(0)})
            : TestTensor(gpu_tensor.dtype(),
                         {gpu_tensor.dim(0),
                          gpu_tensor.num_elements() / std::max<int64_t>(1, gpu_tensor.dim(0))});
    gpu_device_->CopyToHost(gpu_tensor, copy->raw());
    return copy;
  }
  std::vector<double> OnHost(const Tensor& gpu_tensor) {
    const TestTensor copy = HostCopy(gpu_tensor);
    std::vector<double> values(static_cast<size_t>(gpu_tensor.num_elements()));
    for (size_t i = 0; i < values.size(); ++i) values[i] = ElementAt(copy, static_cast<int64_t>(i));
    return values;
  }

  // Random rows in 1×128.
  TwinInput Quantized(int64_t rows, int64_t columns, float deviation = 1.0f) {
    return {Floats(DType::kF8E4M3, {rows, columns}, 30.0f),
            Floats(DType::kF32, {rows, (columns + kFp8Block - 1) / kFp8Block}, deviation / 30)};
  }
  // What the GPU wrote in 1×128 is exactly what quantising the rows that it writes in act gives.
  void ExpectQuantizedOf(const LinearInput& quantized, const Tensor& rows) {
    const TestTensor values = HostCopy(quantized.values), scales = HostCopy(quantized.scales);
    ExpectQuantized({*values, *scales}, HostCopy(rows));
  }
  // The same up to the last place: of kernels that quantise what they have not rounded to act.
  void ExpectQuantizedNear(const LinearInput& quantized, const Tensor& rows) {
    const TestTensor values = HostCopy(quantized.values), scales = HostCopy(quantized.scales);
    const TestTensor expected = HostCopy(rows);
    for (int64_t i = 0; i < expected->num_elements(); ++i) {
      const int64_t row = i / expected->dim(1), column = i % expected->dim(1);
      const double factor = At(scales, row, column / kFp8Block);
      const double value = ElementAt(expected, i);
      // Half a unit of E4M3, normal or subnormal, and one rounding to act.
      const double error = std::abs(value) * (0x1p-4 + 0x1p-8) + factor * 0x1p-10;
      ASSERT_NEAR(ElementAt(values, i) * factor, value, error) << row << " " << column;
    }
  }

  // A weight of `experts` matrices, or a plain one for 0, as a slice of a larger one.
  TwinWeight RandomWeight(DType dtype, int64_t experts, int64_t outputs, int64_t inputs,
                          int row_offset, int column_offset) {
    const bool is_stack = experts > 0;
    const float deviation = dtype == DType::kF8E4M3 ? 0.02f : 1.0f;
    const Twin values = is_stack ? Floats(dtype, {experts, outputs, inputs}, deviation)
                                 : Floats(dtype, {outputs, inputs}, deviation);
    TwinWeight weight = {{.values = values.cpu}, {.values = values.gpu}};
    if (dtype != DType::kF8E4M3) return weight;
    // A slice that does not begin with its blocks stands in a larger grid of them.
    const int64_t block_rows =
        row_offset > 0 ? (outputs + row_offset) / kFp8Block + 2 : (outputs + 127) / kFp8Block;
    const int64_t block_columns =
        column_offset > 0 ? (inputs + column_offset) / kFp8Block + 2 : (inputs + 127) / kFp8Block;
    const Twin factors = is_stack ? Floats(DType::kF32, {experts, block_rows, block_columns})
                                  : Floats(DType::kF32, {block_rows, block_columns});
    for (Weight* side : {&weight.cpu, &weight.gpu}) {
      side->scale_inv = side == &weight.cpu ? factors.cpu : factors.gpu;
      side->row_offset = row_offset;
      side->column_offset = column_offset;
    }
    return weight;
  }

  struct AbsoluteWeight {
    TestTensor values, scale_inv;
    Weight weight;
  };
  static AbsoluteWeight AbsoluteOf(const Weight& weight) {
    const auto absolute = [](const Tensor& tensor) {
      return tensor.rank() == 3 ? Absolute(tensor, {tensor.dim(0), tensor.dim(1), tensor.dim(2)})
                                : Absolute(tensor, {tensor.dim(0), tensor.dim(1)});
    };
    const bool is_fp8 = weight.scale_inv.present();
    AbsoluteWeight result = {absolute(weight.values),
                             is_fp8 ? absolute(weight.scale_inv) : TestTensor(DType::kF32, {1, 1}),
                             {}};
    result.weight = weight;
    result.weight.values = result.values;
    if (is_fp8) result.weight.scale_inv = result.scale_inv;
    return result;
  }
  // Absolute values of a tensor of rank 2 whose rows may be strided.
  static TestTensor AbsoluteRows(const Tensor& tensor) {
    TestTensor absolute(DType::kF32, {tensor.dim(0), tensor.dim(1)});
    for (int64_t i = 0; i < tensor.num_elements(); ++i) {
      const double value = At(tensor, i / tensor.dim(1), i % tensor.dim(1));
      SetElement(absolute, i, std::abs(static_cast<float>(value)));
    }
    return absolute;
  }

  // The same of what a linear layer reads, factors applied.
  static TestTensor AbsoluteInput(const LinearInput& x) {
    if (!x.quantized()) return AbsoluteRows(x.values);
    TestTensor absolute(DType::kF32, {x.values.dim(0), x.values.dim(1)});
    for (int64_t i = 0; i < x.values.num_elements(); ++i) {
      const int64_t row = i / x.values.dim(1), column = i % x.values.dim(1);
      const double value = At(x.values, row, column) * At(x.scales, row, column / kFp8Block);
      SetElement(absolute, i, std::abs(static_cast<float>(value)));
    }
    return absolute;
  }

  // `magnitudes`: Σ |product| of each element of `out`, dense. `unit`: what tensor cores lose of
  // products that they add up, relative to the largest: 2^-13 for FP8 on Hopper.
  void ExpectSums(const Twin& out, int64_t inputs, const Tensor& magnitudes, double unit = 0.0) {
    const double relative = 2 * static_cast<double>(inputs + 2) * kFloatRoundoff + unit;
    const double own = OwnRounding(out.cpu.dtype());
    ExpectWithin(out, [&](int64_t i, double value) {
      const double error = relative * ElementAt(magnitudes, i);
      return error + own * (std::abs(value) + error);
    });
  }

  // What the GPU wrote differs from the CPU's by at most this share of it, row by row, in the
  // Euclidean norm.
  void ExpectRowsWithin(const Twin& twin, double share) {
    const std::vector<double> found = OnHost(twin.gpu), expected = Values(twin.cpu);
    const size_t size = found.size() / static_cast<size_t>(twin.cpu.dim(0));
    for (size_t first = 0; first < found.size(); first += size) {
      double difference = 0.0, norm = 0.0;
      for (size_t i = first; i < first + size; ++i) {
        difference += (found[i] - expected[i]) * (found[i] - expected[i]);
        norm += expected[i] * expected[i];
      }
      EXPECT_LE(std::sqrt(difference), share * std::sqrt(norm)) << "row " << first / size;
    }
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
