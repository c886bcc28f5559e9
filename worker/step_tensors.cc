#include "worker/step_tensors.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/status_macros.h"

namespace fathom {
namespace {

constexpr int64_t kAlignment = 16;  // elements: 64 bytes

int64_t Padded(const std::vector<int32_t>& values) {
  return (static_cast<int64_t>(values.size()) + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

absl::Status StepTensors::Set(const StepBatch& batch) {
  const int64_t tokens = batch.num_tokens(), sequences = batch.num_sequences();
  const int64_t rows = static_cast<int64_t>(batch.logit_rows.size());
  struct Part {
    const std::vector<int32_t>& values;
    Tensor& tensor;
    std::initializer_list<int64_t> shape;
  };
  const Part parts[] = {
      {batch.token_ids, token_ids_, {tokens}},
      {batch.positions, positions_, {tokens}},
      {batch.places, places_, {tokens}},
      {batch.logit_rows, logit_rows_, {rows}},
      {batch.query_start, attention_.query_start, {sequences + 1}},
      {batch.context_lens, attention_.context_lens, {sequences}},
      {batch.block_tables, attention_.block_tables, {sequences, batch.max_blocks}},
  };
  attention_.block_size = batch.block_size;
  for (const Part& part : parts) {
    // Only read.
    part.tensor = Tensor(const_cast<int32_t*>(part.values.data()), DType::kI32, part.shape);
    CHECK_EQ(part.tensor.num_elements(), static_cast<int64_t>(part.values.size()));
  }
  if (device_.shares_host_memory()) return absl::OkStatus();

  packed_.clear();
  for (const Part& part : parts) {
    packed_.insert(packed_.end(), part.values.begin(), part.values.end());
    packed_.resize(packed_.size() + Padded(part.values) - part.values.size());
  }
  const int64_t size = static_cast<int64_t>(packed_.size());
  const int64_t num_bytes = size * SizeOf(DType::kI32);
  if (memory_.num_bytes() < num_bytes) {
    { const Buffer released = std::move(memory_); }
    ASSIGN_OR_RETURN(memory_, device_.Allocate(2 * num_bytes));
  }
  device_.CopyFromHost(packed_.data(), Tensor(memory_.data(), DType::kI32, {size}));
  auto* place = static_cast<int32_t*>(memory_.data());
  for (const Part& part : parts) {
    part.tensor = Tensor(place, DType::kI32, part.shape);
    place += Padded(part.values);
  }
  return absl::OkStatus();
}

}  // namespace fathom
