// Vocabulary of the kernel tests: tensors that own their memory, seeded random contents, values
// read as double, and the targets that Highway may choose.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "hwy/targets.h"
#include "kernels/device.h"
#include "kernels/number_formats.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"

namespace fathom {

// Memory of exactly the tensor's size, so that a sanitizer sees every access beside it.
class TestTensor {
 public:
  TestTensor(DType dtype, std::initializer_list<int64_t> shape)
      : bytes_(std::make_shared<std::vector<char>>(
            static_cast<size_t>(Tensor(nullptr, dtype, shape).num_bytes()))),
        view_(bytes_->data(), dtype, shape) {}

  operator const Tensor&() const { return view_; }
  operator LinearInput() const { return view_; }
  const Tensor* operator->() const { return &view_; }
  const Tensor& operator*() const { return view_; }

 private:
  std::shared_ptr<std::vector<char>> bytes_;
  Tensor view_;
};

// Room for rows in 1×128.
struct QuantizedTensor {
  QuantizedTensor(int64_t rows, int64_t columns)
      : values(DType::kF8E4M3, {rows, columns}),
        scales(DType::kF32, {rows, (columns + kFp8Block - 1) / kFp8Block}) {}
  operator LinearInput() const { return {*values, *scales}; }

  TestTensor values;
  TestTensor scales;
};

inline double ElementAt(const Tensor& tensor, int64_t place) {
  switch (tensor.dtype()) {
    case DType::kF32:
      return tensor.data<float>()[place];
    case DType::kBF16:
      return ToFloat(tensor.data<BFloat16>()[place]);
    case DType::kF8E4M3:
      return ToFloat(tensor.data<Float8E4M3>()[place]);
    case DType::kI32:
      return tensor.data<int32_t>()[place];
  }
  return 0.0;
}

inline double At(const Tensor& tensor, int64_t i) {
  return ElementAt(tensor, i * tensor.stride(0));
}
inline double At(const Tensor& tensor, int64_t i, int64_t j) {
  return ElementAt(tensor, i * tensor.stride(0) + j * tensor.stride(1));
}
inline double At(const Tensor& tensor, int64_t i, int64_t j, int64_t k) {
  return ElementAt(tensor, i * tensor.stride(0) + j * tensor.stride(1) + k * tensor.stride(2));
}

inline void SetElement(const Tensor& tensor, int64_t place, float value) {
  switch (tensor.dtype()) {
    case DType::kF32:
      tensor.data<float>()[place] = value;
      break;
    case DType::kBF16:
      tensor.data<BFloat16>()[place] = ToBFloat16(value);
      break;
    case DType::kF8E4M3:
      tensor.data<Float8E4M3>()[place] = ToFloat8E4M3(value);
      break;
    case DType::kI32:
      tensor.data<int32_t>()[place] = static_cast<int32_t>(value);
      break;
  }
}

class Random {
 public:
  explicit Random(uint64_t seed) : generator_(seed) {}

  int Below(int limit) { return std::uniform_int_distribution<int>(0, limit - 1)(generator_); }
  float Normal() { return std::normal_distribution<float>()(generator_); }

  // A dense tensor of normal numbers.
  TestTensor Floats(DType dtype, std::initializer_list<int64_t> shape, float deviation = 1.0f) {
    TestTensor tensor(dtype, shape);
    for (int64_t i = 0; i < tensor->num_elements(); ++i) {
      SetElement(tensor, i, Normal() * deviation);
    }
    return tensor;
  }

  TestTensor Ints(std::initializer_list<int64_t> shape, int limit) {
    TestTensor tensor(DType::kI32, shape);
    for (int64_t i = 0; i < tensor->num_elements(); ++i) {
      tensor->data<int32_t>()[i] = Below(limit);
    }
    return tensor;
  }

 private:
  std::mt19937_64 generator_;
};

inline TestTensor IntTensor(const std::vector<int32_t>& values) {
  TestTensor tensor(DType::kI32, {static_cast<int64_t>(values.size())});
  std::copy(values.begin(), values.end(), tensor->data<int32_t>());
  return tensor;
}

// The choices [T, k] that go to the experts [first_expert, first_expert + num_experts), sorted.
struct OwnedGroups {
  OwnedGroups(const Tensor& experts, int first_expert, int num_experts)
      : rows(DType::kI32, {experts.num_elements()}), offsets(DType::kI32, {num_experts + 1}) {
    int32_t count = 0;
    for (int e = 0; e < num_experts; ++e) {
      for (int32_t row = 0; row < experts.num_elements(); ++row) {
        if (experts.data<int32_t>()[row] == first_expert + e) rows->data<int32_t>()[count++] = row;
      }
      offsets->data<int32_t>()[e + 1] = count;
    }
  }
  operator ExpertGroups() const { return {.rows = rows, .offsets = offsets, .notes = {}}; }

  TestTensor rows;
  TestTensor offsets;
};

// The bytes of a tensor, row by row, for comparing bit by bit.
inline std::string BytesOf(const Tensor& tensor) {
  if (tensor.rank() == 1 || tensor.dense()) {
    return std::string(static_cast<const char*>(tensor.raw()),
                       static_cast<size_t>(tensor.num_bytes()));
  }
  std::string bytes;
  for (int64_t i = 0; i < tensor.dim(0); ++i) bytes += BytesOf(tensor[i]);
  return bytes;
}

inline std::unique_ptr<Device> OpenTestDevice(int num_threads) {
  return *OpenCpuDevice({.num_threads = num_threads});
}

// Unit roundoffs: the largest relative error of one rounding.
inline constexpr double kFloatRoundoff = 0x1p-24;
inline double RoundoffOf(DType dtype) { return dtype == DType::kBF16 ? 0x1p-8 : kFloatRoundoff; }

// The instruction sets that this machine has, named; a test with this fixture runs on each.
class EveryTargetTest : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override {
    hwy::SetSupportedTargetsForTest(GetParam());
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
  void TearDown() override {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};

inline std::string TargetNameOf(const testing::TestParamInfo<int64_t>& info) {
  return hwy::TargetName(info.param);
}

#define INSTANTIATE_ON_EVERY_TARGET(fixture)     \
  INSTANTIATE_TEST_SUITE_P(EveryTarget, fixture, \
                           testing::ValuesIn(hwy::SupportedAndGeneratedTargets()), TargetNameOf)

}  // namespace fathom
