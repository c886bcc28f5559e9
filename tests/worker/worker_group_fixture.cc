#include "tests/worker/worker_group_fixture.h"

#include <cstdlib>
#include <filesystem>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/check.h"
#include "grpcpp/server_builder.h"
#include "proto/endpoint.h"
#include "tests/worker/golden.h"

namespace fathom {
namespace {

constexpr uint32_t kNumKvBlocks = 64;

absl::Status FromGrpc(const grpc::Status& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

}  // namespace

TestWorker::TestWorker(const std::string& model_directory, const WorkerServiceOptions& options) {
  char folder[] = "/tmp/fathom-worker-XXXXXX";
  CHECK(mkdtemp(folder) != nullptr);
  folder_ = folder;
  address_ = absl::StrCat("unix:", folder_, "/worker.sock");
  absl::StatusOr<std::unique_ptr<Device>> device = OpenCpuDevice({});
  CHECK(device.ok()) << device.status();
  absl::StatusOr<std::unique_ptr<ShardKeeper>> keeper = ShardKeeper::Open(
      {.model_directory = model_directory, .host_bytes = HostMemoryBytes()}, *std::move(device));
  CHECK(keeper.ok()) << keeper.status();
  keeper_ = *std::move(keeper);
  service_ = std::make_unique<WorkerService>(options, *keeper_);
  grpc::ServerBuilder builder;
  builder.AddListeningPort(address_, grpc::InsecureServerCredentials());
  builder.RegisterService(service_.get());
  server_ = builder.BuildAndStart();
  CHECK(server_ != nullptr);
  const auto channel = ConnectTo(address_, {});
  CHECK(channel.ok()) << channel.status();
  stub_ = v1::Worker::NewStub(*channel);
}

TestWorker::~TestWorker() {
  service_->Close();
  server_->Shutdown(absl::ToChronoTime(absl::Now() + absl::Seconds(1)));
  server_.reset();
  std::filesystem::remove_all(folder_);
}

JoinOutcome CallJoin(v1::Worker::Stub& stub, const v1::JoinRequest& request) {
  JoinOutcome outcome;
  grpc::ClientContext context;
  const auto reader = stub.Join(&context, request);
  v1::JoinProgress progress;
  while (reader->Read(&progress)) outcome.progress.push_back(progress);
  outcome.status = reader->Finish();
  return outcome;
}

TestGroup::TestGroup(int world_size, const std::string& model,
                     const WorkerServiceOptions& options) {
  for (int rank = 0; rank < world_size; ++rank) {
    workers_.push_back(std::make_unique<TestWorker>(GoldenCheckpoint(model), options));
  }
}

v1::ShardSpec TestGroup::Shard(int rank) const {
  v1::ShardSpec shard;
  shard.set_rank(rank);
  shard.set_world_size(world_size());
  shard.set_block_size(16);
  shard.set_max_tokens_per_step(512);
  shard.set_max_sequences(8);
  shard.set_max_model_len(512);
  shard.set_workers_on_this_host(world_size());
  shard.set_max_logit_rows(512);
  return shard;
}

v1::JoinRequest TestGroup::JoinOf(int rank, uint64_t join_epoch) const {
  v1::JoinRequest request;
  request.set_epoch(join_epoch);
  *request.mutable_shard() = Shard(rank);
  request.set_num_kv_blocks(kNumKvBlocks);
  request.set_collectives(collectives);
  request.set_rank0_address(workers_[0] == nullptr ? "unix:/none" : workers_[0]->address());
  request.set_timeout_ms(timeout_ms);
  return request;
}

std::vector<JoinOutcome> TestGroup::Join(uint64_t join_epoch) {
  std::vector<JoinOutcome> outcomes(workers_.size());
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world_size(); ++rank) {
    threads.emplace_back(
        [&, rank] { outcomes[rank] = CallJoin(worker(rank).stub(), JoinOf(rank, join_epoch)); });
  }
  for (std::thread& thread : threads) thread.join();
  return outcomes;
}

void TestGroup::Form(uint64_t join_epoch) {
  for (const JoinOutcome& outcome : Join(join_epoch)) {
    CHECK(outcome.status.ok()) << outcome.status.error_message();
    CHECK_EQ(outcome.progress.back().phase(), v1::JoinProgress::PHASE_READY);
  }
  epoch = join_epoch;
  step = 0;
  streams_.clear();
  for (const auto& worker : workers_) {
    Stream& stream = streams_.emplace_back();
    stream.context = std::make_unique<grpc::ClientContext>();
    stream.stream = worker->stub().Run(stream.context.get());
  }
}

void TestGroup::Send(int rank, const v1::StepCommand& command) {
  streams_[rank].stream->Write(command);
}

absl::StatusOr<v1::StepResult> TestGroup::Step(v1::StepCommand command) {
  command.set_epoch(epoch);
  command.set_step(++step);
  for (int rank = 0; rank < world_size(); ++rank) Send(rank, command);
  v1::StepResult first;
  for (int rank = 0; rank < world_size(); ++rank) {
    v1::StepResult result;
    if (!streams_[rank].stream->Read(&result)) return FromGrpc(Finish(rank));
    CHECK_EQ(result.epoch(), epoch);
    CHECK_EQ(result.step(), step);
    if (rank == 0) first = std::move(result);
  }
  return first;
}

grpc::Status TestGroup::Finish(int rank) {
  v1::StepResult more;
  CHECK(!streams_[rank].stream->Read(&more));
  return streams_[rank].stream->Finish();
}

grpc::Status TestGroup::Drain(int rank) {
  v1::StepResult result;
  while (streams_[rank].stream->Read(&result)) continue;
  return streams_[rank].stream->Finish();
}

void TestGroup::CancelStreams() {
  for (Stream& stream : streams_) stream.context->TryCancel();
  for (int rank = 0; rank < world_size(); ++rank) Drain(rank);
  streams_.clear();
}

v1::SequenceAdmission& AddAdmission(v1::StepCommand& command, uint32_t slot,
                                    const std::vector<int32_t>& token_ids) {
  v1::SequenceAdmission& admission = *command.add_admitted();
  admission.set_slot(slot);
  admission.mutable_token_ids()->Add(token_ids.begin(), token_ids.end());
  admission.set_num_prompt_tokens(static_cast<uint32_t>(token_ids.size()));
  return admission;
}

void AddScheduled(v1::StepCommand& command, uint32_t slot, int num_tokens,
                  const std::vector<uint32_t>& new_blocks) {
  command.add_slots(slot);
  command.add_num_tokens(num_tokens);
  command.add_num_new_blocks(static_cast<uint32_t>(new_blocks.size()));
  command.mutable_new_block_ids()->Add(new_blocks.begin(), new_blocks.end());
}

std::vector<int32_t> TestGroup::Greedy(const std::vector<int32_t>& prompt, int count, int chunk) {
  std::vector<uint32_t> blocks;  // all at once, from the end of the cache
  const uint32_t num_blocks = (static_cast<uint32_t>(prompt.size()) + count + 15) / 16;
  for (uint32_t i = 0; i < num_blocks; ++i) blocks.push_back(kNumKvBlocks - 1 - i);

  std::vector<int32_t> generated;
  int computed = 0;
  while (static_cast<int>(generated.size()) < count) {
    v1::StepCommand command;
    if (computed == 0) {
      AddAdmission(command, 3, prompt).mutable_sampling()->set_temperature(0.0f);
    }
    const int pending = static_cast<int>(prompt.size() + generated.size()) - computed;
    AddScheduled(command, 3, std::min(chunk, pending),
                 computed == 0 ? blocks : std::vector<uint32_t>());
    computed += std::min(chunk, pending);
    const absl::StatusOr<v1::StepResult> result = Step(command);
    CHECK(result.ok()) << result.status();
    for (const uint32_t token_id : result->sampled_token_ids()) generated.push_back(token_id);
  }
  v1::StepCommand release;
  release.add_released_slots(3);
  CHECK(Step(release).ok());
  return generated;
}

}  // namespace fathom
