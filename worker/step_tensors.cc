#include "worker/step_tensors.h"

#include <algorithm>
#include <bit>
#include <initializer_list>
#include <iterator>

#include "base/check.h"
#include "base/status_macros.h"

namespace fathom {
namespace {

int64_t Padded(int64_t size) {
  constexpr int64_t kAlignment = 16;  // elements: 64 bytes
  return (size + kAlignment - 1) / kAlignment * kAlignment;
}

int64_t RoundedWidth(int64_t max_blocks) {
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(max_blocks)));
}

}  // namespace

int64_t StepTensors::MemoryBytes(const StepTensorsOptions& options, const Device& device) {
  if (device.shares_host_memory()) return 0;
  return SizeOf(DType::kI32) * (3 * Padded(options.max_tokens) + Padded(options.max_logit_rows) +
                                Padded(options.max_sequences + 1) + Padded(options.max_sequences) +
                                Padded(options.max_sequences * RoundedWidth(options.max_blocks)));
}

absl::Status StepTensors::Allocate() {
  const int64_t num_bytes = MemoryBytes(options_, device_);
  ASSIGN_OR_RETURN(memory_, device_.Allocate(num_bytes));
  packed_.reserve(num_bytes / SizeOf(DType::kI32));
  return absl::OkStatus();
}

void StepTensors::Set(const StepBatch& batch) {
  const int64_t tokens = batch.num_tokens(), sequences = batch.num_sequences();
  const int64_t rows = static_cast<int64_t>(batch.logit_rows.size());
  const bool is_copied = !device_.shares_host_memory();
  const int64_t width = is_copied ? RoundedWidth(batch.max_blocks) : batch.max_blocks;
  CHECK(tokens <= options_.max_tokens && rows <= options_.max_logit_rows &&
        sequences <= options_.max_sequences && batch.max_blocks <= options_.max_blocks)
      << tokens << " tokens, " << rows << " rows, " << sequences << " sequences of "
      << batch.max_blocks << " blocks";
  attention_.block_size = batch.block_size;
  attention_.host_query_start = batch.query_start.data();
  attention_.host_context_lens = batch.context_lens.data();
  struct Part {
    const std::vector<int32_t>& values;
    Tensor& tensor;
    std::initializer_list<int64_t> shape;
    int64_t row_size;  // of the values; of the tensor the last of the shape
  };
  const Part parts[] = {
      {batch.token_ids, token_ids_, {tokens}, tokens},
      {batch.positions, positions_, {tokens}, tokens},
      {batch.places, places_, {tokens}, tokens},
      {batch.logit_rows, logit_rows_, {rows}, rows},
      {batch.query_start, attention_.query_start, {sequences + 1}, sequences + 1},
      {batch.context_lens, attention_.context_lens, {sequences}, sequences},
      {batch.block_tables, attention_.block_tables, {sequences, width}, batch.max_blocks},
  };
  packed_.clear();
  for (const Part& part : parts) {
    const int64_t row_size = part.row_size;
    // Only read.
    part.tensor = Tensor(const_cast<int32_t*>(part.values.data()), DType::kI32, part.shape);
    if (!is_copied) continue;
    part.tensor =
        Tensor(static_cast<int32_t*>(memory_.data()) + packed_.size(), DType::kI32, part.shape);
    const size_t end = packed_.size() + Padded(part.tensor.num_elements());
    const int64_t padding = *(part.shape.end() - 1) - row_size;
    for (auto row = part.values.begin(); row != part.values.end(); row += row_size) {
      packed_.insert(packed_.end(), row, row + row_size);
      packed_.resize(packed_.size() + padding);
    }
    packed_.resize(end);
  }
  if (!is_copied) return;
  device_.CopyFromHost(packed_.data(), Tensor(memory_.data(), DType::kI32, {std::ssize(packed_)}));
}

}  // namespace fathom
