#include "kernels/tensor.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"

namespace fathom {

const char* NameOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kBF16:
      return "BF16";
    case DType::kF8E4M3:
      return "F8_E4M3";
    case DType::kI32:
      return "I32";
  }
  return "?";
}

Tensor::Tensor(void* data, DType dtype, std::initializer_list<int64_t> shape)
    : data_(data), dtype_(dtype), rank_(static_cast<int>(shape.size())) {
  CHECK_LE(rank_, kMaxRank);
  std::copy(shape.begin(), shape.end(), shape_.begin());
  int64_t stride = 1;
  for (int i = rank_ - 1; i >= 0; --i) {
    CHECK_GE(shape_[i], 0);
    strides_[i] = stride;
    stride *= shape_[i];
  }
}

int64_t Tensor::num_elements() const {
  if (rank_ == 0) return 0;
  int64_t count = 1;
  for (int i = 0; i < rank_; ++i) count *= shape_[i];
  return count;
}

bool Tensor::dense() const {
  int64_t stride = 1;
  for (int i = rank_ - 1; i >= 0; --i) {
    if (shape_[i] != 1 && strides_[i] != stride) return num_elements() == 0;
    stride *= shape_[i];
  }
  return true;
}

Tensor Tensor::Slice(int dimension, int64_t begin, int64_t end) const {
  CHECK(0 <= begin && begin <= end && end <= dim(dimension))
      << "[" << begin << ", " << end << ") along " << dimension << " of " << DebugString();
  Tensor slice = *this;
  slice.shape_[dimension] = end - begin;
  slice.data_ = static_cast<char*>(data_) + begin * strides_[dimension] * SizeOf(dtype_);
  return slice;
}

Tensor Tensor::operator[](int64_t index) const {
  CHECK(rank_ > 1 && index >= 0 && index < shape_[0]) << index << " of " << DebugString();
  Tensor element = *this;
  element.data_ = static_cast<char*>(data_) + index * strides_[0] * SizeOf(dtype_);
  element.rank_ = rank_ - 1;
  std::copy(shape_.begin() + 1, shape_.end(), element.shape_.begin());
  std::copy(strides_.begin() + 1, strides_.end(), element.strides_.begin());
  return element;
}

Tensor Tensor::Reshape(std::initializer_list<int64_t> shape) const {
  CHECK(dense()) << DebugString();
  const Tensor reshaped(data_, dtype_, shape);
  CHECK_EQ(reshaped.num_elements(), num_elements());
  return reshaped;
}

Tensor Tensor::SplitLast(int64_t outer, int64_t inner) const {
  CHECK(rank_ >= 1 && rank_ < kMaxRank) << DebugString();
  CHECK_EQ(outer * inner, shape_[rank_ - 1]);
  Tensor split = *this;
  split.rank_ = rank_ + 1;
  split.shape_[rank_ - 1] = outer;
  split.shape_[rank_] = inner;
  split.strides_[rank_] = strides_[rank_ - 1];
  split.strides_[rank_ - 1] = inner * strides_[rank_ - 1];
  return split;
}

std::string Tensor::DebugString() const {
  std::string text = absl::StrCat(NameOf(dtype_), "[");
  for (int i = 0; i < rank_; ++i) absl::StrAppend(&text, i > 0 ? ", " : "", shape_[i]);
  return text + "]";
}

}  // namespace fathom
