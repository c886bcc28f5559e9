// What a worker is within one epoch: its mirror of the sequences, its KV cache, its place among the
// ranks, and the making of steps from these.
//
// Rank 0 samples; the chosen tokens go to all ranks, so that their mirrors agree.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/communicator.h"
#include "worker/device_sampler.h"
#include "worker/grammar_masks.h"
#include "worker/kv_cache.h"
#include "worker/model_shard.h"
#include "worker/sampler.h"
#include "worker/shard_host.h"
#include "worker/slot_table.h"

namespace fathom {

class StepRunner final : public StepMaker {
 public:
  // `shard` and `grammars` must outlive this. `device_sampler`: for as many rows as there are
  // slots. `grammars`: on rank 0, else null; null there means that nobody may ask for one.
  StepRunner(uint64_t epoch, const SlotTableOptions& slots, ModelShard& shard,
             std::unique_ptr<KvCache> kv_cache, std::unique_ptr<Communicator> communicator,
             std::unique_ptr<DeviceSampler> device_sampler, GrammarKeeper* grammars);
  ~StepRunner() override { shard_.ForgetRecordings(); }

  uint64_t epoch() const override { return epoch_; }
  int rank() const { return communicator_->rank(); }

  absl::StatusOr<v1::StepResult> Run(const v1::StepCommand& command, absl::Time arrived) override;
  void Abort() override { communicator_->Abort(); }

 private:
  // Token id of each sampled row, or kFault.
  using Choices = std::vector<int32_t>;
  static constexpr int32_t kFault = -1;

  // The grammars of sequences that leave and come.
  void UpdateGrammars(const v1::StepCommand& command);
  // The error is the sequence's fault.
  absl::StatusOr<SamplingContext> ContextOf(int slot);
  absl::Status MakeStep(const v1::StepCommand& command, v1::StepResult& result);
  void ReportPromptLogprobs(const StepPlan& plan, const Tensor& logits, v1::StepResult& result);
  // Tokens of the rows that are plain (Sampler::IsPlain), -1 if faulty; kFault for the others.
  Choices ChoosePlain(const StepPlan& plan, const Tensor& logits);
  void Choose(const StepPlan& plan, const Tensor& logits, Choices& choices, v1::StepResult& result);

  const uint64_t epoch_;
  const int vocab_size_;
  ModelShard& shard_;
  const std::unique_ptr<KvCache> kv_cache_;
  const std::unique_ptr<Communicator> communicator_;
  const std::unique_ptr<DeviceSampler> device_sampler_;
  SlotTable slots_;
  GrammarMasks grammar_masks_;
  Sampler sampler_;
  uint64_t last_step_ = 0;
};

}  // namespace fathom
