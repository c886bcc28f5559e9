#include "worker/step_batch.h"

#include <algorithm>

#include "base/check.h"

namespace fathom {

StepBatch BuildStepBatch(absl::Span<const SequenceSlice> slices, int block_size) {
  StepBatch batch;
  batch.block_size = block_size;
  batch.query_start.push_back(0);
  for (const SequenceSlice& slice : slices) {
    const int end = slice.first + slice.count;
    const int num_blocks = (end + block_size - 1) / block_size;
    CHECK_LE(end, static_cast<int>(slice.token_ids.size()));
    CHECK_LE(num_blocks, static_cast<int>(slice.blocks.size()));
    batch.max_blocks = std::max(batch.max_blocks, num_blocks);
    for (int position = slice.first; position < end; ++position) {
      batch.token_ids.push_back(slice.token_ids[position]);
      batch.positions.push_back(position);
      batch.places.push_back(slice.blocks[position / block_size] * block_size +
                             position % block_size);
    }
    batch.query_start.push_back(batch.num_tokens());
    batch.context_lens.push_back(end);
  }

  batch.block_tables.resize(slices.size() * batch.max_blocks);
  for (size_t i = 0; i < slices.size(); ++i) {
    const int num_blocks = (batch.context_lens[i] + block_size - 1) / block_size;
    std::copy_n(slices[i].blocks.begin(), num_blocks,
                batch.block_tables.begin() + i * batch.max_blocks);
  }
  return batch;
}

}  // namespace fathom
