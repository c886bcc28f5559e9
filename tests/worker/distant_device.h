// A CPU device that says its memory is its own, as a GPU's is: whoever reads it without a copy goes
// unnoticed here, but every path that copies is taken.
#pragma once

#include <memory>
#include <string>

#include "kernels/device.h"

namespace fathom {

class DistantDevice : public Device {
 public:
  DistantDevice() : device_(*OpenCpuDevice({})) {}

  std::string name() const override { return device_->name(); }
  Ops& ops() override { return device_->ops(); }
  bool shares_host_memory() const override { return false; }
  absl::StatusOr<Buffer> Allocate(int64_t num_bytes) override {
    return device_->Allocate(num_bytes);
  }
  int64_t AvailableBytes() const override { return device_->AvailableBytes(); }
  void CopyFromHost(const void* host, const Tensor& tensor) override {
    device_->CopyFromHost(host, tensor);
  }
  void CopyToHost(const Tensor& tensor, void* host) override { device_->CopyToHost(tensor, host); }
  void Copy(const Tensor& from, const Tensor& to) override { device_->Copy(from, to); }

 private:
  std::unique_ptr<Device> device_;
};

}  // namespace fathom
