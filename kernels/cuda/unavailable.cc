// Stands in for the CUDA backend in a build without it.

#include <memory>

#include "kernels/device.h"
#include "kernels/ops.h"

namespace fathom {

absl::StatusOr<std::unique_ptr<Device>> OpenCudaDevice(const DeviceOptions&) {
  return absl::UnavailableError(
      "this build has no CUDA backend; expected --device cpu, or a build with the cuda preset");
}

}  // namespace fathom
