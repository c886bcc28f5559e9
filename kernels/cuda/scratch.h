// Device memory that operations need beside their arguments. Not thread-safe.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fathom {

// Grows to what its user needed most and stays. Contents do not survive growth.
class GrowingMemory {
 public:
  GrowingMemory() = default;
  GrowingMemory(const GrowingMemory&) = delete;
  GrowingMemory& operator=(const GrowingMemory&) = delete;
  ~GrowingMemory();

  // 256-byte aligned.
  void* Reserve(int64_t num_bytes);

 private:
  void* data_ = nullptr;
  int64_t num_bytes_ = 0;
};

namespace cuda {

constexpr int64_t AlignUp(int64_t num_bytes) { return (num_bytes + 255) / 256 * 256; }

// What it was given, and memory of its own where that is too small, as in tests.
class Scratch {
 public:
  void Use(void* memory, int64_t num_bytes) {
    memory_ = memory;
    num_bytes_ = num_bytes;
  }
  // 256-byte aligned; replaces what was reserved before.
  void* Reserve(int64_t num_bytes) {
    return num_bytes <= num_bytes_ ? memory_ : growing_.Reserve(num_bytes);
  }

 private:
  void* memory_ = nullptr;
  int64_t num_bytes_ = 0;
  GrowingMemory growing_;
};

}  // namespace cuda
}  // namespace fathom
