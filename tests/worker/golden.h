// Golden data of tests/golden/: what DeepSeek's own code computes, and how far from it is right.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "tests/worker/checkpoint_files.h"

namespace fathom {

inline std::string GoldenPath(const std::string& name) {
  return absl::StrCat("tests/golden/", name);
}
inline std::string GoldenCheckpoint(const std::string& name) {
  return absl::StrCat(GoldenPath(name), "/ckpt");
}

// The tensors of one golden file, by name.
class Golden {
 public:
  // `path` under tests/golden/
  explicit Golden(const std::string& path) {
    const auto file = SafetensorsFile::Open(GoldenPath(path));
    CHECK(file.ok()) << file.status();
    tensors_ = ReadTensors(**file);
  }

  std::vector<float> Floats(const std::string& name) const { return Values<float>(name, "F32"); }
  std::vector<double> Doubles(const std::string& name) const { return Values<double>(name, "F64"); }
  std::vector<int32_t> Ints(const std::string& name) const { return Values<int32_t>(name, "I32"); }

 private:
  template <typename T>
  std::vector<T> Values(const std::string& name, const char* dtype) const {
    const auto found = tensors_.find(name);
    CHECK(found != tensors_.end() && found->second.dtype == dtype) << name;
    std::vector<T> values(found->second.bytes.size() / sizeof(T));
    std::memcpy(values.data(), found->second.bytes.data(), found->second.bytes.size());
    return values;
  }

  FileTensors tensors_;
};

// Largest difference over the largest value expected: the measure of tests/golden's README.
inline double RelativeError(const std::vector<float>& found, const std::vector<float>& expected) {
  CHECK_EQ(found.size(), expected.size());
  double difference = 0.0, largest = 0.0;
  for (size_t i = 0; i < found.size(); ++i) {
    if (!std::isfinite(found[i])) return INFINITY;
    difference = std::max(difference, std::fabs(double{found[i]} - expected[i]));
    largest = std::max(largest, std::fabs(double{expected[i]}));
  }
  return difference / largest;
}

inline double RootMeanSquareError(const std::vector<float>& found,
                                  const std::vector<float>& expected) {
  CHECK_EQ(found.size(), expected.size());
  double sum = 0.0;
  for (size_t i = 0; i < found.size(); ++i) {
    sum += (double{found[i]} - expected[i]) * (double{found[i]} - expected[i]);
  }
  return std::sqrt(sum / static_cast<double>(found.size()));
}

}  // namespace fathom
