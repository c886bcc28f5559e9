// A client with one request: makes it up, and knows what the answer must be, token for token.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "coordinator/status_board.h"
#include "coordinator/token_stream.h"
#include "proto/generate.pb.h"
#include "tests/simulation/world.h"
#include "worker/sim_token.h"

namespace fathom {

// A request that must be served, or, one time in ten, refused. `seed` tells it from all others.
struct MadeUpRequest {
  v1::GenerateRequest message;
  bool is_valid = true;
};
MadeUpRequest MakeUpRequest(Random& random, const ModelLimits& limits, uint64_t seed);

class SimulatedClient final : public TokenStream {
 public:
  // `world` outlives this.
  SimulatedClient(World& world, v1::GenerateRequest request, const ModelLimits& limits);

  void OnTokens(v1::GenerateResponse response) override;
  void OnEnd(const absl::Status& status) override;
  void Flush() override { has_unflushed_ = false; }

  // It hangs up. If it has just ended it may still be told so, at the next heartbeat.
  void HangUp() { has_hung_up_ = true; }
  // That heartbeat was; from now on nothing may come.
  void ExpectSilence();
  // It may end so from now on.
  void AllowFault() { may_be_faulty_ = true; }
  void AllowUnavailable() { may_be_unavailable_ = true; }
  void AllowQueueFull() { may_be_too_late_ = true; }

  uint64_t seed() const { return request_.sampling().seed(); }
  uint64_t salt() const;
  bool has_hung_up() const { return has_hung_up_; }
  bool is_silenced() const { return expects_silence_; }
  bool has_ended() const { return has_ended_; }
  // Ended or hung up.
  bool is_done() const { return has_ended_ || has_hung_up_; }
  int most_tokens() const { return request_.prompt_token_ids_size() + max_tokens_; }
  const v1::GenerateRequest& request() const { return request_; }
  bool has_unflushed() const { return has_unflushed_; }

 private:
  void Fail(const std::string& what);
  void TakePromptLogprobs(const v1::GenerateResponse& response);
  void TakeToken(uint32_t token_id, const v1::TokenLogprobs* logprobs);
  void CheckLogprobs(const v1::TokenLogprobs& logprobs, uint32_t token_id, int32_t next,
                     uint32_t num_top);
  void CheckFinish(const v1::GenerateResponse& response);
  bool IsStop(uint32_t token_id) const;
  int32_t NextToken(const SimPrefix& prefix) const;

  World& world_;
  const v1::GenerateRequest request_;
  const int vocab_size_;
  const std::vector<int> eos_token_ids_;
  int max_tokens_;

  SimPrefix prefix_;         // prompt and what has come
  SimPrefix prompt_prefix_;  // as far as prompt logprobs have come
  int num_tokens_ = 0;
  int num_prompt_logprobs_ = 0;
  bool must_finish_ = false;
  bool has_finished_ = false;
  uint32_t last_token_id_ = 0;
  bool has_ended_ = false;
  bool has_unflushed_ = false;  // it was told something, and not that this is all for now
  bool has_hung_up_ = false;
  bool has_heard_more_ = false;  // since then
  bool expects_silence_ = false;
  bool may_be_faulty_ = false;
  bool may_be_unavailable_ = false;
  bool may_be_too_late_ = false;  // the queue is full when its grammar has been prepared
};

}  // namespace fathom
