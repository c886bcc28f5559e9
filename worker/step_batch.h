// One step's work as the forward pass wants it: packed rows of tokens, and where they stand.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"

namespace fathom {

// Host vectors that tensors below view. T tokens, S sequences, L rows of logits.
struct StepBatch {
  std::vector<int32_t> token_ids;  // [T]
  std::vector<int32_t> positions;  // [T], within the sequence, from 0
  std::vector<int32_t> places;     // [T]: block id * block_size + offset, where the token's KV goes
  std::vector<int32_t> query_start;   // [S + 1]
  std::vector<int32_t> context_lens;  // [S], this step's tokens included
  std::vector<int32_t> block_tables;  // [S, max_blocks], padded with 0
  int max_blocks = 0;
  int block_size = 0;

  // Token rows whose logits are wanted, ascending: the last token of each sequence that samples,
  // and prompt tokens whose logprobs were asked for.
  std::vector<int32_t> logit_rows;  // [L]

  int num_tokens() const { return static_cast<int>(token_ids.size()); }
  int num_sequences() const { return static_cast<int>(context_lens.size()); }
};

// The tokens [first, first + count) of a sequence, whose KV lies in `blocks`.
struct SequenceSlice {
  absl::Span<const int32_t> token_ids;  // all of the sequence
  absl::Span<const int32_t> blocks;     // its block table; may hold more than is needed
  int first = 0;
  int count = 0;
};

// Packs slices in the order given; logit_rows is left empty. REQUIRES: every slice lies within its
// tokens and its blocks.
StepBatch BuildStepBatch(absl::Span<const SequenceSlice> slices, int block_size);

}  // namespace fathom
