// Tokens from logits that lie in device memory: the rows stay there where the device can draw, and
// cross to the host one by one where somebody must look at them.
//
// Not thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/device.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"

namespace fathom {

class DeviceSampler {
 public:
  // ResourceExhausted when the device is full. `device` must outlive the sampler.
  static absl::StatusOr<std::unique_ptr<DeviceSampler>> Create(Device& device, int max_rows);

  // The tokens of Ops::SampleTokens, on the host. Valid until the next call.
  //   logits [L, vocab_size] f32, device memory   at most max_rows rows
  absl::Span<const int32_t> Sample(const Tensor& logits, absl::Span<const SamplingRow> rows);

  // One row on the host. Valid until the next call.
  absl::Span<const float> Row(const Tensor& logits, int row);

 private:
  DeviceSampler(Device& device, Buffer memory, int max_rows);

  Device& device_;
  const Buffer memory_;
  const Tensor rows_;    // [max_rows, kSamplingRowWords]
  const Tensor tokens_;  // [max_rows]
  std::vector<int32_t> host_tokens_;
  std::vector<float> host_row_;
};

}  // namespace fathom
