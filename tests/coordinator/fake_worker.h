// A worker without a model, in this process: its next token is a hash of the seed and of the whole
// prefix, which it reads back from its KV blocks. A coordinator that mixes up slots, blocks, chunks
// or tokens is caught, by a wrong token or by a violation of the protocol.
//
// A test scripts it: to be slow, to hang, to break its stream, to die and come back, to describe
// itself differently. Thread-safe.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "grpcpp/server.h"
#include "proto/worker.grpc.pb.h"

namespace fathom {

// What follows `prefix`, of which the first num_prompt_tokens are the prompt.
uint32_t TokenAfter(const std::vector<uint32_t>& prefix, int num_prompt_tokens,
                    const v1::SamplingParams& sampling, uint32_t vocab_size);

class FakeWorker final : public v1::Worker::Service {
 public:
  static constexpr uint32_t kVocabSize = 1000;
  static constexpr uint32_t kMaxPositionEmbeddings = 512;
  static constexpr uint32_t kEosTokenId = 7;
  // A sequence whose prompt begins with this has a fault when it first samples.
  static constexpr uint32_t kPoisonTokenId = 666;

  // Listens on `address` at once.
  explicit FakeWorker(std::string address);
  ~FakeWorker() override;

  const std::string& address() const { return address_; }

  // What it says of itself from now on.
  void ChangeDescription(const std::function<void(v1::DescribeResponse&)>& change);

  // At the next step from now: breaks the stream with this status, hangs, or lets `change` spoil
  // the result. Each happens once; breaking, if so wished, several times in a row.
  void BreakAtNextStep(grpc::Status status, int times = 1);
  void HangAtNextStep();
  void SpoilNextResult(std::function<void(v1::StepResult&)> change);
  void FailNextJoin(grpc::Status status);
  void SetStepDelay(int milliseconds);
  // Grammars whose text is "refused" are, and those that are "slow" wait for this.
  void LetSlowGrammarsPass();
  int num_grammars_waiting() const;

  // As if killed, and started again.
  void Die();
  void ComeBack();

  // What the coordinator did against the protocol.
  std::vector<std::string> violations() const;
  int num_steps() const;
  int num_joins() const;
  int num_slots_in_use() const;

 private:
  struct Mirror {
    std::vector<uint32_t> tokens;
    int num_prompt_tokens = 0;
    int num_computed = 0;
    int num_prompt_logprobs_done = 0;
    bool has_fault = false;
    std::vector<uint32_t> blocks;
    v1::SamplingParams sampling;
  };

  grpc::Status Describe(grpc::ServerContext*, const v1::DescribeRequest*,
                        v1::DescribeResponse*) override;
  grpc::Status Join(grpc::ServerContext*, const v1::JoinRequest*,
                    grpc::ServerWriter<v1::JoinProgress>*) override;
  grpc::Status Run(grpc::ServerContext*,
                   grpc::ServerReaderWriter<v1::StepResult, v1::StepCommand>*) override;
  grpc::Status Abort(grpc::ServerContext*, const v1::AbortRequest*, v1::AbortResponse*) override;

  grpc::Status PrepareGrammar(grpc::ServerContext*, const v1::PrepareGrammarRequest*,
                              v1::PrepareGrammarResponse*) override;

  grpc::Status MakeStep(grpc::ServerContext* context, const v1::StepCommand& command,
                        v1::StepResult& result);
  // All below require mutex_.
  void Compute(const v1::StepCommand& command, v1::StepResult& result);
  void ComputeSequence(uint32_t slot, int num_tokens, Mirror& mirror, v1::StepResult& result);
  void Sample(uint32_t slot, Mirror& mirror, v1::StepResult& result);
  uint32_t& KvAt(const Mirror& mirror, int position);
  void Violation(const std::string& what);

  const std::string address_;
  std::unique_ptr<grpc::Server> server_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  v1::DescribeResponse description_;
  v1::ShardSpec shard_;
  uint64_t epoch_ = 0;
  uint64_t last_step_ = 0;
  std::map<uint32_t, Mirror> mirrors_;  // by slot
  std::vector<uint32_t> kv_;            // token ids, by block and offset
  std::vector<std::string> violations_;
  int num_steps_ = 0;
  int num_joins_ = 0;
  int step_delay_milliseconds_ = 0;
  grpc::Status break_status_;
  int num_breaks_left_ = 0;
  grpc::Status join_failure_;
  bool must_hang_ = false;
  bool slow_grammars_pass_ = false;
  int num_grammars_waiting_ = 0;
  std::set<std::string> prepared_;
  bool is_dying_ = false;
  std::function<void(v1::StepResult&)> spoil_;
};

}  // namespace fathom
