// A CPU device that knows how many bytes are allocated from it. One at a time.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "base/check.h"
#include "kernels/device.h"

namespace fathom {

class CountingDevice final : public Device {
 public:
  CountingDevice() : device_(*OpenCpuDevice({})) {
    live_bytes_ = 0;
    peak_bytes_ = 0;
  }

  std::string name() const override { return device_->name(); }
  Ops& ops() override { return device_->ops(); }
  bool shares_host_memory() const override { return device_->shares_host_memory(); }

  absl::StatusOr<Buffer> Allocate(int64_t num_bytes) override {
    constexpr int64_t kAlignment = 64;
    const int64_t padded = (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
    void* data = std::aligned_alloc(kAlignment, padded);
    CHECK(data != nullptr);
    std::memset(data, 0, padded);
    live_bytes_ += num_bytes;
    peak_bytes_ = std::max(peak_bytes_, live_bytes_);
    return Buffer(data, num_bytes, [](void* released, int64_t released_bytes) {
      live_bytes_ -= released_bytes;
      std::free(released);
    });
  }
  int64_t AvailableBytes() const override { return device_->AvailableBytes(); }
  void CopyFromHost(const void* host, const Tensor& tensor) override {
    device_->CopyFromHost(host, tensor);
  }
  void CopyToHost(const Tensor& tensor, void* host) override { device_->CopyToHost(tensor, host); }
  void Copy(const Tensor& from, const Tensor& to) override { device_->Copy(from, to); }

  int64_t live_bytes() const { return live_bytes_; }
  int64_t peak_bytes() const { return peak_bytes_; }

 private:
  static inline int64_t live_bytes_ = 0;  // a buffer knows no device, so there is one count
  static inline int64_t peak_bytes_ = 0;

  std::unique_ptr<Device> device_;
};

}  // namespace fathom
