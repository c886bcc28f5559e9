// A CPU device that says its memory is its own and that records, as a GPU does: while it records,
// operations and copies on the device are noted instead of done, and whatever the host must not do
// then fails. Replaying does what was noted, on the tensors as they were given.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kernels/device.h"
#include "kernels/ops.h"

namespace fathom {

class RecordingOps final : public Ops {
 public:
  explicit RecordingOps(Ops& ops) : ops_(ops) {}

  void Do(std::function<void()> operation) {
    if (notes_ == nullptr) return operation();
    notes_->push_back(std::move(operation));
  }
  void SetNotes(std::vector<std::function<void()>>* notes) { notes_ = notes; }
  bool is_recording() const { return notes_ != nullptr; }

  int64_t ScratchBytes(const StepLimits& limits) const override {
    return ops_.ScratchBytes(limits) + kScratchBytes;
  }
  void UseScratch(const StepLimits& limits, void* memory) override {
    CHECK(memory != nullptr);
    ops_.UseScratch(limits, memory);
  }
  void BeginStep(const AttentionBatch& batch) override {
    CHECK(!is_recording());
    CHECK(batch.host_query_start != nullptr && batch.host_context_lens != nullptr);
    ops_.BeginStep(batch);
  }
  void Embed(const Tensor& token_ids, const Tensor& table, int first_row,
             const Tensor& out) override {
    Do([=, this] { ops_.Embed(token_ids, table, first_row, out); });
  }
  void AddRmsNorm(const Tensor& x, const Tensor& y, const Tensor& weight, float eps,
                  const Tensor& normed, const LinearInput& quantized) override {
    Do([=, this] { ops_.AddRmsNorm(x, y, weight, eps, normed, quantized); });
  }
  void Linear(const LinearInput& x, const Weight& weight, const Tensor& out) override {
    Do([=, this] { ops_.Linear(x, weight, out); });
  }
  void StoreLatents(const Tensor& qkv_a, const Tensor& q_norm, const Tensor& kv_norm, float eps,
                    const Tensor& positions, const Tensor& cos_sin, const Tensor& places,
                    const LinearInput& q_a, const Tensor& cache) override {
    Do([=, this] {
      ops_.StoreLatents(qkv_a, q_norm, kv_norm, eps, positions, cos_sin, places, q_a, cache);
    });
  }
  void MlaAttention(const Tensor& q, const MlaWeights& weights, const Tensor& positions,
                    const Tensor& cos_sin, const Tensor& cache, const AttentionBatch& batch,
                    float scale, const LinearInput& out) override {
    AttentionBatch kept = batch;
    if (is_recording()) kept.host_query_start = kept.host_context_lens = nullptr;  // of this step
    Do([=, this] { ops_.MlaAttention(q, weights, positions, cos_sin, cache, kept, scale, out); });
  }
  void Route(const Tensor& x, const Tensor& gate, const Tensor& bias, const RoutingConfig& config,
             int first_expert, const Routes& routes) override {
    Do([=, this] { ops_.Route(x, gate, bias, config, first_expert, routes); });
  }
  void GroupedLinear(const LinearInput& x, const ExpertGroups& groups, const Weight& weight,
                     int num_choices, const Tensor& out) override {
    Do([=, this] { ops_.GroupedLinear(x, groups, weight, num_choices, out); });
  }
  void SwiGlu(const Tensor& gate_up, const ExpertGroups* groups, const LinearInput& out) override {
    const ExpertGroups kept = groups == nullptr ? ExpertGroups() : *groups;
    const bool has_groups = groups != nullptr;
    Do([=, this] { ops_.SwiGlu(gate_up, has_groups ? &kept : nullptr, out); });
  }
  void CombineExperts(const Tensor& y, const Routes& routes, bool accumulate,
                      const Tensor& out) override {
    Do([=, this] { ops_.CombineExperts(y, routes, accumulate, out); });
  }
  void GatherRows(const Tensor& x, const Tensor& rows, const Tensor& out) override {
    Do([=, this] { ops_.GatherRows(x, rows, out); });
  }
  void SampleTokens(const Tensor& logits, const Tensor& rows, const Tensor& tokens) override {
    Do([=, this] { ops_.SampleTokens(logits, rows, tokens); });
  }
  void Add(const Tensor& x, const Tensor& y) override {
    Do([=, this] { ops_.Add(x, y); });
  }
  void Dequantize(const Weight& weight, const Tensor& out) override {
    Do([=, this] { ops_.Dequantize(weight, out); });
  }
  void QuantizeFp8(const Tensor& x, const Weight& out) override {
    Do([=, this] { ops_.QuantizeFp8(x, out); });
  }
  void FillRandom(const Tensor& out, float amplitude, uint64_t seed) override {
    Do([=, this] { ops_.FillRandom(out, amplitude, seed); });
  }

 private:
  static constexpr int64_t kScratchBytes = 64;

  Ops& ops_;
  std::vector<std::function<void()>>* notes_ = nullptr;
};

class RecordingDevice final : public Device {
 public:
  RecordingDevice() : device_(*OpenCpuDevice({})), ops_(device_->ops()) {}

  std::string name() const override { return device_->name(); }
  Ops& ops() override { return ops_; }
  bool shares_host_memory() const override { return false; }
  absl::StatusOr<Buffer> Allocate(int64_t num_bytes) override {
    CHECK(!ops_.is_recording());
    return device_->Allocate(num_bytes);
  }
  int64_t AvailableBytes() const override { return device_->AvailableBytes(); }
  void CopyFromHost(const void* host, const Tensor& tensor) override {
    CHECK(!ops_.is_recording());
    device_->CopyFromHost(host, tensor);
  }
  void CopyToHost(const Tensor& tensor, void* host) override {
    CHECK(!ops_.is_recording());
    device_->CopyToHost(tensor, host);
  }
  void Copy(const Tensor& from, const Tensor& to) override {
    ops_.Do([=, this] { device_->Copy(from, to); });
  }
  absl::StatusOr<std::unique_ptr<Recording>> Record(
      absl::FunctionRef<absl::Status()> queue_work) override {
    auto notes = std::make_unique<Notes>(num_replayed_);
    ops_.SetNotes(&notes->operations);
    const absl::Status status = queue_work();
    ops_.SetNotes(nullptr);
    if (!status.ok()) return status;
    ++num_recorded_;
    return notes;
  }

  int num_recorded() const { return num_recorded_; }
  int num_replayed() const { return num_replayed_; }

 private:
  struct Notes final : Recording {
    explicit Notes(int& num_replayed) : num_replayed(num_replayed) {}
    void Replay() override {
      for (const auto& operation : operations) operation();
      ++num_replayed;
    }
    int& num_replayed;
    std::vector<std::function<void()>> operations;
  };

  std::unique_ptr<Device> device_;
  RecordingOps ops_;
  int num_recorded_ = 0;
  int num_replayed_ = 0;
};

}  // namespace fathom
