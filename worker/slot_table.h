// The sequences this worker has been told of, mirrored from the coordinator's commands.
//
// Every rank of a group applies the same commands and appends the same sampled tokens, so all
// mirrors are equal. Commands come off the wire and are not trusted: whatever is wrong with one is
// InvalidArgument with the slot and the numbers, never a crash, and never memory outside the
// limits below. After an error the table is of no further use.
//
// Not thread-safe; only the thread that runs steps touches it.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "worker/sampler.h"
#include "worker/sampling_params.h"
#include "worker/step_batch.h"

namespace fathom {

namespace v1 {
class SequenceAdmission;
class StepCommand;
}  // namespace v1

struct SlotTableOptions {
  int vocab_size = 0;
  int max_sequences = 0;  // slots are numbered [0, max_sequences)
  int max_model_len = 0;  // tokens of a sequence
  int max_tokens_per_step = 0;
  int max_logit_rows = 0;  // of one step
  int block_size = 16;     // tokens per KV block
  int num_kv_blocks = 0;   // block ids are below it
};

// What one command asks to be computed and reported.
struct StepPlan {
  // A sequence whose tokens are all computed after this step.
  struct SampledRow {
    int slot = 0;
    int logit_row = 0;  // index into batch.logit_rows
  };
  // A prompt token whose logprob was asked for, read off the row of the token before it.
  struct PromptRow {
    int slot = 0;
    int logit_row = 0;
    int32_t token_id = 0;
    int position = 0;
  };

  StepBatch batch;
  std::vector<SampledRow> sampled;     // in batch order
  std::vector<PromptRow> prompt_rows;  // in batch order, ascending positions within a slot
  // Scheduled before the coordinator knew that they had a fault: nothing of them is computed.
  std::vector<int> slots_with_faults;
};

class SlotTable {
 public:
  explicit SlotTable(const SlotTableOptions& options);

  // Releases, admits, appends blocks and counts the scheduled tokens as computed, in this order.
  absl::StatusOr<StepPlan> Apply(const v1::StepCommand& command);

  // REQUIRES: the slot is taken (it came from Apply).
  const SamplingParams& sampling(int slot) const;
  // Prompt and output. Valid until the table changes.
  absl::Span<const int32_t> token_ids(int slot) const;
  // Valid until the table changes.
  SamplingContext ContextOf(int slot) const;
  // REQUIRES: all tokens of the slot are computed, and token_id < vocab_size.
  void AppendSampledToken(int slot, int32_t token_id);
  // In place of a token: the slot waits to be released, and what a step wants of it is skipped.
  // REQUIRES: all tokens of the slot are computed.
  void MarkFault(int slot);

 private:
  struct Sequence {
    std::vector<int32_t> token_ids;
    std::vector<int32_t> blocks;
    int num_prompt_tokens = 0;
    int num_computed = 0;
    int num_prompt_logprobs_done = 0;
    SamplingParams sampling;
    TokenCounts counts;  // only with penalties
    bool has_fault = false;
    uint64_t scheduled_in_step = 0;
  };

  absl::StatusOr<Sequence*> Find(uint32_t slot);
  absl::Status Release(uint32_t slot);
  absl::Status Admit(const v1::SequenceAdmission& admission);
  absl::Status Schedule(const v1::StepCommand& command, StepPlan& plan);
  absl::Status AppendBlocks(uint32_t slot, Sequence& sequence,
                            absl::Span<const uint32_t> block_ids);
  absl::Status CheckTokens(uint32_t slot, const Sequence& sequence, uint32_t num_tokens) const;
  void AddLogitRows(int slot, const Sequence& sequence, const SequenceSlice& slice, int first_row,
                    StepPlan& plan) const;

  const SlotTableOptions options_;
  std::vector<std::optional<Sequence>> slots_;
  uint64_t num_steps_ = 0;
};

}  // namespace fathom
