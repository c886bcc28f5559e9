#include "tests/simulation/simulated_client.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace fathom {
namespace {

// Makes one thing wrong with a valid request.
void Spoil(Random& random, const ModelLimits& limits, v1::GenerateRequest& request) {
  const uint32_t vocab_size = limits.model.vocab_size();
  v1::SamplingParams& sampling = *request.mutable_sampling();
  switch (random.Between(0, 12)) {
    case 0:
      request.clear_prompt_token_ids();
      break;
    case 1:
      request.set_prompt_token_ids(random.Between(0, request.prompt_token_ids_size() - 1),
                                   vocab_size + random.Between(0, 1) * 1000000);
      break;
    case 2:
      request.set_max_tokens(random.OneIn(2) ? UINT32_MAX : limits.model.max_model_len());
      break;
    case 3:
      sampling.set_temperature(random.OneIn(2) ? -1 : std::numeric_limits<float>::quiet_NaN());
      break;
    case 4:
      sampling.set_top_p(random.OneIn(2) ? 0 : std::numeric_limits<float>::infinity());
      break;
    case 5:
      sampling.set_min_tokens(UINT32_MAX);
      break;
    case 6:
      sampling.add_stop_token_ids(vocab_size);
      break;
    case 7:
      sampling.set_num_logprobs(UINT32_MAX);
      break;
    case 8:
      sampling.set_repetition_penalty(0);
      break;
    case 9:
      sampling.add_logit_bias()->set_token_id(UINT32_MAX);
      break;
    case 11:
      request.set_max_queue_ms(UINT32_MAX);
      break;
    case 10:
      request.set_request_id(std::string(1000, 'x'));
      break;
    default:
      request.set_max_tokens(0);
      sampling.clear_num_prompt_logprobs();
      break;
  }
}

}  // namespace

MadeUpRequest MakeUpRequest(Random& random, const ModelLimits& limits, uint64_t seed) {
  MadeUpRequest made;
  v1::GenerateRequest& request = made.message;
  v1::SamplingParams& sampling = *request.mutable_sampling();
  const int vocab_size = static_cast<int>(limits.model.vocab_size());
  const int most_tokens =
      static_cast<int>(std::min<int64_t>(limits.model.max_model_len(), limits.kv_cache_tokens));
  // Mostly short; some as long as it gets.
  const int total = random.OneIn(12) ? most_tokens : random.Between(1, std::min(most_tokens, 90));
  int num_prompt_tokens = std::max(1, random.Between(0, total));
  if (random.OneIn(2)) {
    sampling.set_num_prompt_logprobs(random.Between(0, std::min(2, vocab_size)));
  }
  const bool reads_only = num_prompt_tokens == total;
  if (reads_only && !sampling.has_num_prompt_logprobs()) --num_prompt_tokens;
  if (num_prompt_tokens == 0) {  // one token in all: it can only be read
    num_prompt_tokens = 1;
    sampling.set_num_prompt_logprobs(0);
  }
  request.set_max_tokens(total - num_prompt_tokens);
  if (request.max_tokens() > 0 && total == most_tokens && random.OneIn(2)) {
    request.clear_max_tokens();  // as many as fit
  }
  // Many begin like others: with one of three beginnings.
  const int num_shared = random.OneIn(3) ? 0 : random.Between(0, num_prompt_tokens);
  Random family(static_cast<uint64_t>(random.Between(0, 2)));
  for (int i = 0; i < num_prompt_tokens; ++i) {
    Random& source = i < num_shared ? family : random;
    request.add_prompt_token_ids(static_cast<uint32_t>(source.Between(0, vocab_size - 1)));
  }
  if (random.OneIn(8)) request.set_cache_salt(absl::StrCat("salt ", random.Between(0, 1)));
  request.set_ignore_eos(random.OneIn(3));
  if (random.OneIn(2)) request.set_priority(random.Between(-2, 2));
  if (random.OneIn(6)) request.set_max_queue_ms(random.Between(1, 200));

  sampling.set_seed(seed);
  if (random.OneIn(3)) {
    sampling.set_num_logprobs(random.Between(0, std::min(3, vocab_size)));
  }
  if (random.OneIn(2)) {
    for (int i = random.Between(1, 3); i > 0; --i) {
      sampling.add_stop_token_ids(static_cast<uint32_t>(random.Between(0, vocab_size - 1)));
    }
  }
  if (request.has_max_tokens() && random.OneIn(3)) {
    sampling.set_min_tokens(random.Between(0, static_cast<int>(request.max_tokens())));
  }
  if (random.OneIn(4)) sampling.set_temperature(random.OneIn(2) ? 0 : 1.5);
  if (random.OneIn(6)) {  // simulated workers do not obey it
    sampling.mutable_grammar()->set_kind(v1::Grammar::KIND_REGEX);
    sampling.mutable_grammar()->set_text("a*");
  }
  if (random.OneIn(10)) {
    made.is_valid = false;
    Spoil(random, limits, request);
  }
  return made;
}

SimulatedClient::SimulatedClient(World& world, v1::GenerateRequest request,
                                 const ModelLimits& limits)
    : world_(world),
      request_(std::move(request)),
      vocab_size_(static_cast<int>(limits.model.vocab_size())),
      eos_token_ids_(limits.model.eos_token_ids().begin(), limits.model.eos_token_ids().end()),
      max_tokens_(static_cast<int>(request_.max_tokens())) {
  if (!request_.has_max_tokens()) {
    max_tokens_ =
        static_cast<int>(std::min<int64_t>(limits.model.max_model_len(), limits.kv_cache_tokens) -
                         request_.prompt_token_ids_size());
  }
  for (const uint32_t token_id : request_.prompt_token_ids()) {
    prefix_.Append(static_cast<int32_t>(token_id));
  }
}

uint64_t SimulatedClient::salt() const {
  uint64_t salt = 0;
  for (const char letter : request_.cache_salt()) salt = salt * 31 + static_cast<uint8_t>(letter);
  return salt;
}

void SimulatedClient::Fail(const std::string& what) {
  world_.Fail(absl::StrCat("request ", seed(), " ", what));
}

int32_t SimulatedClient::NextToken(const SimPrefix& prefix) const {
  return prefix.NextToken(vocab_size_, eos_token_ids_);
}

void SimulatedClient::OnTokens(v1::GenerateResponse response) {
  world_.Log("tokens", seed(), response.token_ids_size(), response.prompt_logprobs_size());
  has_unflushed_ = true;
  has_heard_more_ |= has_hung_up_;
  if (has_ended_) return Fail("hears something after its end");
  if (expects_silence_) return Fail("hears something after it has hung up");
  if (has_finished_) return Fail("hears something after it has finished");
  TakePromptLogprobs(response);
  const bool wants_logprobs = request_.sampling().has_num_logprobs();
  if (wants_logprobs ? response.logprobs_size() != response.token_ids_size()
                     : response.logprobs_size() > 0) {
    return Fail(absl::StrCat("has ", response.logprobs_size(), " logprobs of ",
                             response.token_ids_size(), " tokens"));
  }
  for (int i = 0; i < response.token_ids_size(); ++i) {
    TakeToken(response.token_ids(i), wants_logprobs ? &response.logprobs(i) : nullptr);
  }
  if (response.finish_reason() != v1::FINISH_REASON_UNSPECIFIED) CheckFinish(response);
}

void SimulatedClient::ExpectSilence() {
  expects_silence_ = true;
  if (has_heard_more_ && !has_ended_) Fail("hears more though it has hung up");
}

void SimulatedClient::TakePromptLogprobs(const v1::GenerateResponse& response) {
  if (response.prompt_logprobs_size() == 0) return;
  if (!request_.sampling().has_num_prompt_logprobs())
    return Fail("did not ask for prompt logprobs");
  if (num_tokens_ > 0) return Fail("has prompt logprobs after its first token");
  for (const v1::TokenLogprobs& logprobs : response.prompt_logprobs()) {
    const int position = ++num_prompt_logprobs_;
    if (position >= request_.prompt_token_ids_size()) return Fail("has prompt logprobs too many");
    prompt_prefix_.Append(static_cast<int32_t>(request_.prompt_token_ids(position - 1)));
    CheckLogprobs(logprobs, request_.prompt_token_ids(position), NextToken(prompt_prefix_),
                  request_.sampling().num_prompt_logprobs());
  }
}

void SimulatedClient::TakeToken(uint32_t token_id, const v1::TokenLogprobs* logprobs) {
  ++world_.tally.tokens;
  if (must_finish_) return Fail("has a token after the one that ends it");
  const bool wants_prompt = request_.sampling().has_num_prompt_logprobs();
  if (wants_prompt && num_prompt_logprobs_ != request_.prompt_token_ids_size() - 1) {
    return Fail("has a token before all of its prompt logprobs");
  }
  const int32_t next = NextToken(prefix_);
  if (token_id != static_cast<uint32_t>(next)) {
    return Fail(
        absl::StrCat("has token ", token_id, " as number ", num_tokens_, ", expected ", next));
  }
  if (logprobs != nullptr) {
    CheckLogprobs(*logprobs, token_id, next, request_.sampling().num_logprobs());
  }
  prefix_.Append(next);
  ++num_tokens_;
  last_token_id_ = token_id;
  if (num_tokens_ > max_tokens_) return Fail("has more than max_tokens");
  must_finish_ = num_tokens_ == max_tokens_ || IsStop(token_id);
}

// That the client asked for; the invented model says no end-of-sequence token.
bool SimulatedClient::IsStop(uint32_t token_id) const {
  const auto& stops = request_.sampling().stop_token_ids();
  return num_tokens_ >= static_cast<int>(request_.sampling().min_tokens()) &&
         std::find(stops.begin(), stops.end(), token_id) != stops.end();
}

void SimulatedClient::CheckLogprobs(const v1::TokenLogprobs& logprobs, uint32_t token_id,
                                    int32_t next, uint32_t num_top) {
  const int rank = SimRank(static_cast<int32_t>(token_id), next, vocab_size_);
  if (logprobs.token_id() != token_id || logprobs.rank() != static_cast<uint32_t>(rank) ||
      logprobs.top_token_ids_size() != static_cast<int>(num_top) ||
      logprobs.top_logprobs_size() != static_cast<int>(num_top)) {
    Fail(absl::StrCat("has logprobs of token ", logprobs.token_id(), ", expected ", token_id));
  }
}

void SimulatedClient::CheckFinish(const v1::GenerateResponse& response) {
  has_finished_ = true;
  const bool only_reads = max_tokens_ == 0;
  if (!must_finish_ && !only_reads) return Fail("finishes early");
  if (request_.sampling().has_num_prompt_logprobs() &&
      num_prompt_logprobs_ != request_.prompt_token_ids_size() - 1) {
    return Fail("finishes without all of its prompt logprobs");
  }
  const bool is_stop = !only_reads && IsStop(last_token_id_);
  if (response.finish_reason() != (is_stop ? v1::FINISH_REASON_STOP : v1::FINISH_REASON_LENGTH)) {
    return Fail("gives the wrong reason for its end");
  }
  if (is_stop ? response.stop_token_id() != last_token_id_ : response.has_stop_token_id()) {
    return Fail("names the wrong stop token");
  }
  const v1::Usage& usage = response.usage();
  if (usage.prompt_tokens() != static_cast<uint32_t>(request_.prompt_token_ids_size()) ||
      usage.completion_tokens() != static_cast<uint32_t>(num_tokens_) ||
      usage.cached_tokens() >= usage.prompt_tokens()) {
    return Fail(absl::StrCat("counts wrongly: ", usage.ShortDebugString()));
  }
  world_.tally.found_in_cache += usage.cached_tokens();
}

void SimulatedClient::OnEnd(const absl::Status& status) {
  world_.Log("end", seed(), static_cast<uint64_t>(status.code()), num_tokens_);
  if (has_ended_) return Fail("ends twice");
  if (expects_silence_) return Fail("ends after it has hung up");
  has_ended_ = true;
  has_unflushed_ = true;
  switch (status.code()) {
    case absl::StatusCode::kOk:
      if (!has_finished_) Fail("ends well without having finished");
      return;
    case absl::StatusCode::kInternal:
      ++world_.tally.faulty;
      if (!may_be_faulty_) Fail(absl::StrCat("has a fault: ", status.message()));
      return;
    case absl::StatusCode::kUnavailable:
      ++world_.tally.lost;
      if (!may_be_unavailable_) Fail(absl::StrCat("is lost: ", status.message()));
      return;
    case absl::StatusCode::kDeadlineExceeded:
      ++world_.tally.expired;
      if (request_.max_queue_ms() == 0 || num_tokens_ + num_prompt_logprobs_ > 0) {
        Fail("expires though it was begun, or is to wait for any time");
      }
      return;
    case absl::StatusCode::kInvalidArgument:
      ++world_.tally.outgrown;
      if (!absl::StrContains(status.message(), "the workers were replaced")) {
        Fail(absl::StrCat("is refused late: ", status.message()));
      }
      return;
    case absl::StatusCode::kResourceExhausted:
      ++world_.tally.refused_full;
      if (!may_be_too_late_) Fail(absl::StrCat("is refused late: ", status.message()));
      return;
    default:
      Fail(absl::StrCat("ends with ", status.ToString()));
  }
}

}  // namespace fathom
