#include "worker/device_sampler.h"

#include <utility>

#include "base/check.h"
#include "base/status_macros.h"

namespace fathom {

absl::StatusOr<std::unique_ptr<DeviceSampler>> DeviceSampler::Create(Device& device, int max_rows) {
  const int64_t num_words = max_rows * (kSamplingRowWords + 1);
  ASSIGN_OR_RETURN(Buffer memory, device.Allocate(num_words * SizeOf(DType::kI32)));
  return std::unique_ptr<DeviceSampler>(new DeviceSampler(device, std::move(memory), max_rows));
}

DeviceSampler::DeviceSampler(Device& device, Buffer memory, int max_rows)
    : device_(device),
      memory_(std::move(memory)),
      rows_(memory_.data(), DType::kI32, {max_rows, kSamplingRowWords}),
      tokens_(static_cast<int32_t*>(memory_.data()) + rows_.num_elements(), DType::kI32,
              {max_rows}),
      host_tokens_(max_rows) {}

absl::Span<const int32_t> DeviceSampler::Sample(const Tensor& logits,
                                                absl::Span<const SamplingRow> rows) {
  const auto count = static_cast<int64_t>(rows.size());
  CHECK_LE(count, tokens_.dim(0));
  if (count == 0) return {};
  const Tensor device_rows = rows_.Slice(0, 0, count), device_tokens = tokens_.Slice(0, 0, count);
  device_.CopyFromHost(rows.data(), device_rows);
  device_.ops().SampleTokens(logits, device_rows, device_tokens);
  device_.CopyToHost(device_tokens, host_tokens_.data());
  return absl::MakeConstSpan(host_tokens_).first(rows.size());
}

absl::Span<const float> DeviceSampler::Row(const Tensor& logits, int row) {
  const Tensor values = logits[row];
  const auto size = static_cast<size_t>(values.num_elements());
  if (device_.shares_host_memory()) return {values.data<float>(), size};
  host_row_.resize(size);
  device_.CopyToHost(values, host_row_.data());
  return host_row_;
}

}  // namespace fathom
