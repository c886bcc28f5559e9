// Scratch memory of the forward pass: planned once, placed once, never allocated in a step.
//
// The same code runs twice: over an arena without memory, which only counts, and over one with that
// many bytes, which gives tensors. So the plan is what is allocated, by construction.
//
// Not thread-safe; used while loading.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "kernels/tensor.h"

namespace fathom {

class Arena {
 public:
  // Counts; its tensors have shapes and no memory.
  Arena() = default;
  // Places tensors from `base` on, 64-byte aligned; as many as the same calls counted before.
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  // Dense.
  Tensor Take(DType dtype, std::initializer_list<int64_t> shape) {
    const Tensor tensor(base_ == nullptr ? nullptr : base_ + used_bytes_, dtype, shape);
    used_bytes_ += (tensor.num_bytes() + kAlignment - 1) / kAlignment * kAlignment;
    peak_bytes_ = std::max(peak_bytes_, used_bytes_);
    return tensor;
  }

  // Rewind(mark) gives back what was taken since Mark(): the next tensors share its memory.
  int64_t Mark() const { return used_bytes_; }
  void Rewind(int64_t mark) { used_bytes_ = mark; }

  int64_t peak_bytes() const { return peak_bytes_; }

 private:
  static constexpr int64_t kAlignment = 64;

  char* base_ = nullptr;
  int64_t used_bytes_ = 0;
  int64_t peak_bytes_ = 0;
};

}  // namespace fathom
