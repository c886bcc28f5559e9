// Memory for large tables that are read at random: in pages of 2 MiB where the system has them, so
// that finding a place costs no second miss for the page's address.
//
// An allocator for containers; what is smaller than such a page comes from the heap as always.
// Thread-safe.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>

namespace fathom {

template <typename T>
struct HugePageAllocator {
  using value_type = T;

  HugePageAllocator() = default;
  template <typename U>
  HugePageAllocator(const HugePageAllocator<U>&) {}  // NOLINT: containers convert them

  T* allocate(size_t count) {
    const size_t num_bytes = count * sizeof(T);
    void* const memory = ::operator new(num_bytes, AlignmentOf(num_bytes));
    // A hint: without it all works as well, and slower.
    if (num_bytes >= kPageBytes) madvise(memory, num_bytes, MADV_HUGEPAGE);
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t count) {
    ::operator delete(memory, AlignmentOf(count * sizeof(T)));
  }
  template <typename U>
  bool operator==(const HugePageAllocator<U>&) const {
    return true;
  }

 private:
  static constexpr size_t kPageBytes = size_t{2} << 20;
  static std::align_val_t AlignmentOf(size_t num_bytes) {
    return std::align_val_t{num_bytes >= kPageBytes ? kPageBytes : alignof(std::max_align_t)};
  }
};

}  // namespace fathom
