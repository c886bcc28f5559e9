#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/cpu_ops.h"
#include "kernels/device.h"

namespace fathom {
namespace {

constexpr int64_t kAlignmentBytes = 64;
constexpr int64_t kMappedBytes = int64_t{1} << 17;    // from this size on pages are mapped
constexpr int64_t kHugePageBytes = int64_t{2} << 20;  // from this size on huge pages are asked for
constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

// The number behind `key` in a file of lines such as "MemAvailable:  123 kB"; -1 when absent.
int64_t ReadNumber(const char* path, const std::string& key) {
  std::ifstream file(path);
  std::string word;
  int64_t number = 0;
  if (key.empty()) return file >> number ? number : -1;
  while (file >> word) {
    if (word == key) return file >> number ? number : -1;
  }
  return -1;
}

// What the control group of a container leaves; page cache that can be dropped counts as free.
int64_t ControlGroupAvailableBytes() {
  const int64_t limit = ReadNumber("/sys/fs/cgroup/memory.max", "");  // "max": no number
  const int64_t used = ReadNumber("/sys/fs/cgroup/memory.current", "");
  if (limit < 0 || used < 0) return kUnlimited;
  const int64_t droppable = ReadNumber("/sys/fs/cgroup/memory.stat", "inactive_file");
  return std::max<int64_t>(0, limit - used + std::max<int64_t>(0, droppable));
}

int64_t RoundUp(int64_t num_bytes, int64_t multiple) {
  return (num_bytes + multiple - 1) / multiple * multiple;
}

void Unmap(void* data, int64_t num_bytes) { munmap(data, static_cast<size_t>(num_bytes)); }
void Free(void* data, int64_t) { std::free(data); }

class CpuDevice final : public Device {
 public:
  explicit CpuDevice(const DeviceOptions& options) : ops_(options.num_threads) {}

  std::string name() const override { return "cpu"; }
  Ops& ops() override { return ops_; }
  bool shares_host_memory() const override { return true; }

  absl::StatusOr<Buffer> Allocate(int64_t num_bytes) override {
    CHECK_GE(num_bytes, 0);
    if (num_bytes == 0) return Buffer();
    if (num_bytes < kMappedBytes) {
      const auto padded = static_cast<size_t>(RoundUp(num_bytes, kAlignmentBytes));
      void* data = std::aligned_alloc(kAlignmentBytes, padded);
      if (data == nullptr) return NoRoom(num_bytes);
      std::memset(data, 0, padded);
      return Buffer(data, num_bytes, Free);
    }
    // Mapped pages are zero and cost nothing until they are touched, so the kernel would promise
    // more than there is.
    if (num_bytes > AvailableBytes()) return NoRoom(num_bytes);
    void* data = mmap(nullptr, static_cast<size_t>(num_bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) return NoRoom(num_bytes);
    if (num_bytes >= kHugePageBytes) {
      madvise(data, static_cast<size_t>(num_bytes), MADV_HUGEPAGE);  // a wish; refusal is harmless
    }
    return Buffer(data, num_bytes, Unmap);
  }

  int64_t AvailableBytes() const override {
    const int64_t kilobytes = ReadNumber("/proc/meminfo", "MemAvailable:");
    const int64_t host_bytes = kilobytes < 0 ? kUnlimited : kilobytes * 1024;
    return std::min(host_bytes, ControlGroupAvailableBytes());
  }

  void CopyFromHost(const void* host, const Tensor& tensor) override {
    if (tensor.num_elements() == 0) return;
    if (tensor.dense()) {
      std::memcpy(tensor.raw(), host, static_cast<size_t>(tensor.num_bytes()));
      return;
    }
    CHECK_GE(tensor.rank(), 2) << tensor.DebugString();
    for (int64_t i = 0; i < tensor.dim(0); ++i) {
      CopyFromHost(static_cast<const char*>(host) + i * tensor[i].num_bytes(), tensor[i]);
    }
  }

  void Copy(const Tensor& from, const Tensor& to) override {
    CHECK(from.dense()) << from.DebugString();
    CHECK_EQ(from.num_bytes(), to.num_bytes());
    CopyFromHost(from.raw(), to);
  }

  void CopyToHost(const Tensor& tensor, void* host) override {
    if (tensor.num_elements() == 0) return;
    if (tensor.dense()) {
      std::memcpy(host, tensor.raw(), static_cast<size_t>(tensor.num_bytes()));
      return;
    }
    CHECK_GE(tensor.rank(), 2) << tensor.DebugString();
    for (int64_t i = 0; i < tensor.dim(0); ++i) {
      CopyToHost(tensor[i], static_cast<char*>(host) + i * tensor[i].num_bytes());
    }
  }

 private:
  absl::Status NoRoom(int64_t num_bytes) const {
    return absl::ResourceExhaustedError(absl::StrCat(
        "no room for ", num_bytes, " bytes of memory; ", AvailableBytes(), " bytes are available"));
  }

  CpuOps ops_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Device>> OpenCpuDevice(const DeviceOptions& options) {
  constexpr int kMostThreads = 1024;
  if (options.num_threads < 1 || options.num_threads > kMostThreads) {
    return absl::InvalidArgumentError(absl::StrCat("number of threads is ", options.num_threads,
                                                   ", expected 1 to ", kMostThreads));
  }
  return std::make_unique<CpuDevice>(options);
}

}  // namespace fathom
