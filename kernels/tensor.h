// A view of device memory with a type, a shape and strides. Owns nothing; copy it freely.
// Thread-compatible.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "base/check.h"

namespace fathom {

enum class DType : uint8_t { kF32, kBF16, kF8E4M3, kI32 };

constexpr int64_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
      return 2;
    case DType::kF8E4M3:
      return 1;
  }
  return 0;
}

const char* NameOf(DType dtype);  // as in safetensors: F32, BF16, F8_E4M3, I32

class Tensor {
 public:
  static constexpr int kMaxRank = 4;

  Tensor() = default;  // "absent": data() is null, rank() is 0

  // Dense, last dimension contiguous.
  Tensor(void* data, DType dtype, std::initializer_list<int64_t> shape);

  bool present() const { return data_ != nullptr; }
  DType dtype() const { return dtype_; }
  int rank() const { return rank_; }
  int64_t dim(int i) const {
    CHECK(i >= 0 && i < rank_) << "dim " << i << " of a tensor of rank " << rank_;
    return shape_[i];
  }
  // Distance in elements between neighbours along dimension i.
  int64_t stride(int i) const {
    CHECK(i >= 0 && i < rank_) << "stride " << i << " of a tensor of rank " << rank_;
    return strides_[i];
  }
  int64_t num_elements() const;
  int64_t num_bytes() const { return num_elements() * SizeOf(dtype_); }
  bool dense() const;  // no gaps: rows follow each other

  void* raw() const { return data_; }

  // REQUIRES: sizeof(T) is the element size.
  template <typename T>
  T* data() const {
    CHECK_EQ(static_cast<int64_t>(sizeof(T)), SizeOf(dtype_));
    return static_cast<T*>(data_);
  }

  // [begin, end) along one dimension; the rest as it was.
  Tensor Slice(int dimension, int64_t begin, int64_t end) const;
  // Element `index` of the first dimension; rank one less.
  Tensor operator[](int64_t index) const;
  // The same elements under another shape. REQUIRES: dense, equal number of elements.
  Tensor Reshape(std::initializer_list<int64_t> shape) const;
  // Splits the last dimension in two: [.., A * B] → [.., A, B]; works on strided rows.
  Tensor SplitLast(int64_t outer, int64_t inner) const;

  std::string DebugString() const;  // "BF16[64, 7168]"

 private:
  void* data_ = nullptr;
  DType dtype_ = DType::kF32;
  int rank_ = 0;
  std::array<int64_t, kMaxRank> shape_ = {};
  std::array<int64_t, kMaxRank> strides_ = {};
};

}  // namespace fathom
