// Which GPU a process computes on. Thread-safety: before the process uses CUDA, by one thread.
//
// The one that is chosen becomes the first that CUDA shows, by CUDA_VISIBLE_DEVICES: so it is the
// current one in every thread without further ado, and the others stay in sight, as they must for
// their memory to be mapped.
#pragma once

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace fathom {

// CUDA_VISIBLE_DEVICES with number `gpu` of those that it shows (absent: of all, as nvidia-smi
// counts them) before the others. Unavailable, saying how many it shows, when it shows fewer.
absl::StatusOr<std::string> VisibleDevicesFrom(const std::optional<std::string>& visible_devices,
                                               int gpu);

// FailedPrecondition when another one was chosen before; else as VisibleDevicesFrom.
absl::Status ChooseGpu(int gpu, const std::optional<std::string>& visible_devices);

// " 3 (this host has 2, 0 to 1)", for a message about a GPU that CUDA does not find; "" when it is
// not known how many there are.
std::string NoSuchGpu(int gpu);

}  // namespace fathom
