// A file of tests/golden/components as tensors.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/tensor.h"
#include "worker/safetensors.h"

namespace fathom {

class GoldenFile {
 public:
  explicit GoldenFile(const std::string& name)
      : file_(*SafetensorsFile::Open(absl::StrCat("tests/golden/components/", name))) {}

  bool Has(const std::string& key) const { return file_->tensors().count(key) > 0; }

  // The values in file order. REQUIRES: T is the type of the tensor.
  template <typename T>
  std::vector<T> Values(const std::string& key) const {
    const TensorInfo& info = file_->tensors().at(key);
    std::vector<T> values(static_cast<size_t>(info.num_bytes) / sizeof(T));
    const absl::Status status = file_->Read(info.file_offset, info.num_bytes, values.data());
    EXPECT_TRUE(status.ok()) << status;
    return values;
  }

  int64_t Dim(const std::string& key, int i) const { return file_->tensors().at(key).shape[i]; }

  // A matrix or vector, with the memory that holds it.
  struct Owned {
    std::vector<char> bytes;
    Tensor tensor;
  };
  Owned Load(const std::string& key, DType dtype) const {
    Owned owned = {Values<char>(key), {}};
    if (file_->tensors().at(key).shape.size() == 1) {
      owned.tensor = Tensor(owned.bytes.data(), dtype, {Dim(key, 0)});
    } else {
      owned.tensor = Tensor(owned.bytes.data(), dtype, {Dim(key, 0), Dim(key, 1)});
    }
    return owned;
  }

 private:
  std::unique_ptr<SafetensorsFile> file_;
};

}  // namespace fathom
