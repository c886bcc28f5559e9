// Working memory of one thread inside one operation: floats, aligned for vectors, not cleared.
// It grows to what the largest operation took and stays. Not thread-safe.
#pragma once

#include <cstddef>

#include "base/check.h"
#include "hwy/aligned_allocator.h"

namespace fathom {

inline constexpr size_t kVectorFloats = 16;  // the widest vector used; lengths are padded to it

inline constexpr size_t PadToVector(size_t count) {
  return (count + kVectorFloats - 1) / kVectorFloats * kVectorFloats;
}

class Scratch {
 public:
  // Forgets what was taken and makes room for `count` floats, each Take rounded up by PadToVector.
  void Reset(size_t count) {
    used_ = 0;
    if (count <= capacity_) return;
    floats_ = hwy::AllocateAligned<float>(count);
    CHECK(floats_ != nullptr) << "no memory for " << count << " floats";
    capacity_ = count;
  }

  float* Take(size_t count) {
    float* taken = floats_.get() + used_;
    used_ += PadToVector(count);
    CHECK_LE(used_, capacity_);
    return taken;
  }

 private:
  hwy::AlignedFreeUniquePtr<float[]> floats_;
  size_t capacity_ = 0;
  size_t used_ = 0;
};

}  // namespace fathom
