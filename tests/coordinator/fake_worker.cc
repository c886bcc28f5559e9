#include "tests/coordinator/fake_worker.h"

#include <algorithm>
#include <chrono>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "grpcpp/server_builder.h"
#include "proto/endpoint.h"

namespace fathom {

namespace {

void AddFault(uint32_t slot, const std::string& reason, v1::StepResult& result) {
  v1::SlotFault& fault = *result.add_faults();
  fault.set_slot(slot);
  fault.set_reason(reason);
}

}  // namespace

uint32_t TokenAfter(const std::vector<uint32_t>& prefix, int num_prompt_tokens,
                    const v1::SamplingParams& sampling, uint32_t vocab_size) {
  uint64_t hash = sampling.seed() + 0x9e3779b97f4a7c15u;
  for (const uint32_t token : prefix) {
    hash = (hash ^ token) * 0xbf58476d1ce4e5b9u;
    hash ^= hash >> 31;
  }
  uint32_t token = static_cast<uint32_t>(hash % vocab_size);
  const auto& stops = sampling.stop_token_ids();
  const int num_generated = static_cast<int>(prefix.size()) - num_prompt_tokens;
  while (num_generated < static_cast<int>(sampling.min_tokens()) &&
         std::find(stops.begin(), stops.end(), token) != stops.end()) {
    token = (token + 1) % vocab_size;
  }
  return token;
}

FakeWorker::FakeWorker(std::string address) : address_(std::move(address)) {
  description_.set_version("test");
  description_.set_model_fingerprint("a model");
  description_.set_architecture("DeepseekV3ForCausalLM");
  description_.set_vocab_size(kVocabSize);
  description_.set_max_position_embeddings(kMaxPositionEmbeddings);
  description_.add_eos_token_ids(kEosTokenId);
  description_.set_device("cpu");
  description_.set_dtype("float32");
  description_.set_kv_cache_dtype("float32");
  description_.set_quantization("none");
  description_.mutable_plan()->set_kv_block_capacity(2000);
  ComeBack();
}

FakeWorker::~FakeWorker() { Die(); }

void FakeWorker::ChangeDescription(const std::function<void(v1::DescribeResponse&)>& change) {
  const std::lock_guard lock(mutex_);
  change(description_);
}

void FakeWorker::BreakAtNextStep(grpc::Status status, int times) {
  const std::lock_guard lock(mutex_);
  num_breaks_left_ = times;
  break_status_ = std::move(status);
}

void FakeWorker::HangAtNextStep() {
  const std::lock_guard lock(mutex_);
  must_hang_ = true;
}

void FakeWorker::SpoilNextResult(std::function<void(v1::StepResult&)> change) {
  const std::lock_guard lock(mutex_);
  spoil_ = std::move(change);
}

void FakeWorker::FailNextJoin(grpc::Status status) {
  const std::lock_guard lock(mutex_);
  join_failure_ = std::move(status);
}

void FakeWorker::SetStepDelay(int milliseconds) {
  const std::lock_guard lock(mutex_);
  step_delay_milliseconds_ = milliseconds;
}

void FakeWorker::Die() {
  {
    const std::lock_guard lock(mutex_);
    is_dying_ = true;
    changed_.notify_all();
  }
  if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
  server_.reset();
}

void FakeWorker::ComeBack() {
  {
    const std::lock_guard lock(mutex_);
    is_dying_ = false;
    epoch_ = 0;
    mirrors_.clear();
    prepared_.clear();
  }
  grpc::ServerBuilder builder;
  builder.AddListeningPort(address_, *ServerCredentialsFor(address_, {}));
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
  CHECK(server_ != nullptr) << address_;
}

std::vector<std::string> FakeWorker::violations() const {
  const std::lock_guard lock(mutex_);
  return violations_;
}

int FakeWorker::num_steps() const {
  const std::lock_guard lock(mutex_);
  return num_steps_;
}

int FakeWorker::num_joins() const {
  const std::lock_guard lock(mutex_);
  return num_joins_;
}

int FakeWorker::num_slots_in_use() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int>(mirrors_.size());
}

grpc::Status FakeWorker::Describe(grpc::ServerContext*, const v1::DescribeRequest* request,
                                  v1::DescribeResponse* response) {
  const std::lock_guard lock(mutex_);
  shard_ = request->shard();
  *response = description_;
  response->set_last_epoch(epoch_);
  return grpc::Status::OK;
}

grpc::Status FakeWorker::Join(grpc::ServerContext*, const v1::JoinRequest* request,
                              grpc::ServerWriter<v1::JoinProgress>* writer) {
  const std::lock_guard lock(mutex_);
  ++num_joins_;
  if (!join_failure_.ok()) return std::exchange(join_failure_, grpc::Status::OK);
  if (request->epoch() <= epoch_) Violation("Join with an old epoch");
  if (request->shard().SerializeAsString() != shard_.SerializeAsString()) {
    Violation("Join with another shard than was described");
  }
  epoch_ = request->epoch();
  last_step_ = 0;
  mirrors_.clear();
  kv_.assign(size_t{request->num_kv_blocks()} * shard_.block_size(), 0);
  v1::JoinProgress progress;
  progress.set_bytes_total(1 << 20);
  for (const auto phase :
       {v1::JoinProgress::PHASE_LOADING_WEIGHTS, v1::JoinProgress::PHASE_ALLOCATING_KV,
        v1::JoinProgress::PHASE_CONNECTING, v1::JoinProgress::PHASE_READY}) {
    progress.set_phase(phase);
    progress.set_bytes_done(1 << 20);
    writer->Write(progress);
  }
  return grpc::Status::OK;
}

grpc::Status FakeWorker::Run(grpc::ServerContext* context,
                             grpc::ServerReaderWriter<v1::StepResult, v1::StepCommand>* stream) {
  v1::StepCommand command;
  while (stream->Read(&command)) {
    v1::StepResult result;
    const grpc::Status status = MakeStep(context, command, result);
    if (!status.ok()) return status;
    stream->Write(result);
  }
  return grpc::Status::OK;
}

grpc::Status FakeWorker::Abort(grpc::ServerContext*, const v1::AbortRequest*, v1::AbortResponse*) {
  return grpc::Status::OK;
}

grpc::Status FakeWorker::PrepareGrammar(grpc::ServerContext* context,
                                        const v1::PrepareGrammarRequest* request,
                                        v1::PrepareGrammarResponse*) {
  const std::string& text = request->grammar().text();
  if (text == "refused") {
    return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "the grammar is wrong at #/a");
  }
  std::unique_lock lock(mutex_);
  if (epoch_ == 0 || shard_.rank() != 0) {
    return grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, "not rank 0, or not yet");
  }
  ++num_grammars_waiting_;
  while (text == "slow" && !slow_grammars_pass_ && !is_dying_ && !context->IsCancelled()) {
    changed_.wait_for(lock, std::chrono::milliseconds(5));
  }
  --num_grammars_waiting_;
  if (is_dying_) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "killed");
  prepared_.insert(text);
  return grpc::Status::OK;
}

int FakeWorker::num_grammars_waiting() const {
  const std::lock_guard lock(mutex_);
  return num_grammars_waiting_;
}

void FakeWorker::LetSlowGrammarsPass() {
  const std::lock_guard lock(mutex_);
  slow_grammars_pass_ = true;
  changed_.notify_all();
}

grpc::Status FakeWorker::MakeStep(grpc::ServerContext* context, const v1::StepCommand& command,
                                  v1::StepResult& result) {
  std::unique_lock lock(mutex_);
  if (num_breaks_left_ > 0) {
    --num_breaks_left_;
    return break_status_;
  }
  if (std::exchange(must_hang_, false)) {
    while (!is_dying_ && !context->IsCancelled()) {
      changed_.wait_for(lock, std::chrono::milliseconds(10));
    }
    return grpc::Status(grpc::StatusCode::ABORTED, "hung");
  }
  Compute(command, result);
  if (spoil_ != nullptr) std::exchange(spoil_, nullptr)(result);
  const std::chrono::milliseconds delay(step_delay_milliseconds_);
  lock.unlock();
  std::this_thread::sleep_for(delay);
  return grpc::Status::OK;
}

void FakeWorker::Compute(const v1::StepCommand& command, v1::StepResult& result) {
  ++num_steps_;
  if (command.epoch() != epoch_) Violation("step of another epoch");
  if (command.step() != ++last_step_) Violation("step out of turn");
  result.set_epoch(command.epoch());
  result.set_step(command.step());
  for (const uint32_t slot : command.released_slots()) {
    if (mirrors_.erase(slot) == 0) Violation(absl::StrCat("slot ", slot, " released twice"));
  }
  for (const v1::SequenceAdmission& admission : command.admitted()) {
    if (admission.slot() >= shard_.max_sequences()) Violation("slot out of range");
    if (!admission.sampling().has_seed()) Violation("admitted without a seed");
    if (shard_.rank() == 0 && admission.sampling().has_grammar() &&
        !prepared_.contains(admission.sampling().grammar().text())) {
      Violation("admitted with a grammar that was not prepared");
    }
    Mirror mirror{
        .tokens = {admission.token_ids().begin(), admission.token_ids().end()},
        .num_prompt_tokens = static_cast<int>(admission.num_prompt_tokens()),
        .num_computed = static_cast<int>(admission.num_computed()),
        .num_prompt_logprobs_done = static_cast<int>(admission.num_prompt_logprobs_done()),
        .has_fault = false,
        .blocks = {},
        .sampling = admission.sampling()};
    if (!mirrors_.emplace(admission.slot(), std::move(mirror)).second) {
      Violation(absl::StrCat("slot ", admission.slot(), " admitted twice"));
    }
  }
  int next_block = 0;
  uint32_t num_tokens = 0;
  for (int i = 0; i < command.slots_size(); ++i) {
    const auto found = mirrors_.find(command.slots(i));
    if (found == mirrors_.end()) return Violation("unknown slot scheduled");
    Mirror& mirror = found->second;
    for (uint32_t k = 0; k < command.num_new_blocks(i); ++k) {
      mirror.blocks.push_back(command.new_block_ids(next_block++));
    }
    num_tokens += command.num_tokens(i);
    ComputeSequence(command.slots(i), static_cast<int>(command.num_tokens(i)), mirror, result);
  }
  if (next_block != command.new_block_ids_size()) Violation("blocks left over");
  if (num_tokens > shard_.max_tokens_per_step()) Violation("more tokens than the budget");
  const int num_rows = result.sampled_slots_size() + result.faults_size();
  int num_prompt_rows = 0;
  for (const auto& logprobs : result.prompt_logprobs()) num_prompt_rows += logprobs.logprobs_size();
  if (num_rows + num_prompt_rows > static_cast<int>(shard_.max_logit_rows())) {
    Violation("more rows of logits than was agreed");
  }
  if (shard_.rank() != 0) {
    result.Clear();
    result.set_epoch(command.epoch());
    result.set_step(command.step());
  }
}

void FakeWorker::ComputeSequence(uint32_t slot, int num_tokens, Mirror& mirror,
                                 v1::StepResult& result) {
  if (mirror.has_fault) return AddFault(slot, "it had a fault in an earlier step", result);
  const int end = mirror.num_computed + num_tokens;
  if (num_tokens < 1 || end > static_cast<int>(mirror.tokens.size())) {
    return Violation(absl::StrCat("slot ", slot, " is to compute ", num_tokens, " tokens"));
  }
  if (end > static_cast<int>(mirror.blocks.size() * shard_.block_size())) {
    return Violation(absl::StrCat("slot ", slot, " lacks blocks"));
  }
  v1::SlotLogprobs prompt_logprobs;
  prompt_logprobs.set_slot(slot);
  for (int position = mirror.num_computed; position < end; ++position) {
    KvAt(mirror, position) = mirror.tokens[position];
    const bool wanted = mirror.sampling.has_num_prompt_logprobs() &&
                        position >= mirror.num_prompt_logprobs_done &&
                        position + 1 < mirror.num_prompt_tokens;
    if (!wanted) continue;
    v1::TokenLogprobs& logprobs = *prompt_logprobs.add_logprobs();
    logprobs.set_token_id(mirror.tokens[position + 1]);
    logprobs.set_logprob(-1);
    logprobs.set_rank(1);
  }
  if (prompt_logprobs.logprobs_size() > 0) *result.add_prompt_logprobs() = prompt_logprobs;
  mirror.num_computed = end;
  if (end == static_cast<int>(mirror.tokens.size())) Sample(slot, mirror, result);
}

void FakeWorker::Sample(uint32_t slot, Mirror& mirror, v1::StepResult& result) {
  if (mirror.tokens[0] == kPoisonTokenId) {
    mirror.has_fault = true;
    return AddFault(slot, "logits are not finite", result);
  }
  std::vector<uint32_t> prefix;
  for (int i = 0; i < mirror.num_computed; ++i) prefix.push_back(KvAt(mirror, i));
  const uint32_t token = TokenAfter(prefix, mirror.num_prompt_tokens, mirror.sampling, kVocabSize);
  mirror.tokens.push_back(token);
  result.add_sampled_slots(slot);
  result.add_sampled_token_ids(token);
  if (!mirror.sampling.has_num_logprobs()) return;
  v1::SlotLogprobs& logprobs = *result.add_logprobs();
  logprobs.set_slot(slot);
  v1::TokenLogprobs& logprob = *logprobs.add_logprobs();
  logprob.set_token_id(token);
  logprob.set_logprob(-0.5);
  logprob.set_rank(1);
  for (uint32_t i = 0; i < mirror.sampling.num_logprobs(); ++i) {
    logprob.add_top_token_ids(i);
    logprob.add_top_logprobs(-1.0f - static_cast<float>(i));
  }
}

uint32_t& FakeWorker::KvAt(const Mirror& mirror, int position) {
  const size_t block_size = shard_.block_size();
  return kv_.at(mirror.blocks.at(position / block_size) * block_size + position % block_size);
}

void FakeWorker::Violation(const std::string& what) {
  violations_.push_back(absl::StrCat("rank ", shard_.rank(), ", step ", last_step_, ": ", what));
}

}  // namespace fathom
