#include "kernels/cuda/gpu_choice.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <system_error>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"

namespace fathom {
namespace {

constexpr char kVisibleDevices[] = "CUDA_VISIBLE_DEVICES";
constexpr char kDeviceOrder[] = "CUDA_DEVICE_ORDER";
// More than a host has. CUDA stops reading the list at the first number that there is not.
constexpr int kMostGpus = 32;

std::string CountAndRange(int count) {
  if (count == 0) return "none";
  return count == 1 ? "1, number 0" : absl::StrCat(count, ", 0 to ", count - 1);
}

// GPUs that the driver shows to this host or container; 0 where that cannot be told.
int NumGpuFiles() {
  int count = 0;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/dev", error)) {
    const std::string name = entry.path().filename().string();
    int number = 0;
    count += absl::StartsWith(name, "nvidia") && absl::SimpleAtoi(name.substr(6), &number);
  }
  return count;
}

}  // namespace

absl::StatusOr<std::string> VisibleDevicesFrom(const std::optional<std::string>& visible_devices,
                                               int gpu) {
  std::vector<std::string> devices;
  if (visible_devices.has_value()) {
    devices = absl::StrSplit(*visible_devices, ',', absl::SkipWhitespace());
    if (gpu >= static_cast<int>(devices.size())) {
      return absl::UnavailableError(absl::StrCat("there is no GPU ", gpu, ": ", kVisibleDevices,
                                                 "='", *visible_devices, "' shows ",
                                                 CountAndRange(static_cast<int>(devices.size()))));
    }
  } else {
    for (int i = 0; i < std::max(kMostGpus, gpu + 1); ++i) devices.push_back(absl::StrCat(i));
  }
  std::rotate(devices.begin(), devices.begin() + gpu, devices.begin() + gpu + 1);
  return absl::StrJoin(devices, ",");
}

absl::Status ChooseGpu(int gpu, const std::optional<std::string>& visible_devices) {
  static int chosen = 0;  // what CUDA takes when nobody chooses
  static bool is_chosen = false;
  if (is_chosen && gpu != chosen) {
    return absl::FailedPreconditionError(
        absl::StrCat("this process computes on GPU ", chosen, ", it cannot change to ", gpu));
  }
  if (!is_chosen && gpu != 0) {
    ASSIGN_OR_RETURN(const std::string devices, VisibleDevicesFrom(visible_devices, gpu));
    setenv(kVisibleDevices, devices.c_str(), /*overwrite=*/1);
  }
  if (!is_chosen) setenv(kDeviceOrder, "PCI_BUS_ID", /*overwrite=*/0);
  is_chosen = true;
  chosen = gpu;
  return absl::OkStatus();
}

std::string NoSuchGpu(int gpu) {
  const int count = NumGpuFiles();
  if (count == 0) return "";
  return absl::StrCat(" ", gpu, " (this host has ", CountAndRange(count), ")");
}

}  // namespace fathom
