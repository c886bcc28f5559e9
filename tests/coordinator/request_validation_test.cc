#include "coordinator/request_validation.h"

#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

ModelLimits Limits() {
  ModelLimits limits;
  limits.model.set_vocab_size(1000);
  limits.model.set_max_model_len(100);
  limits.model.add_eos_token_ids(3);
  limits.model.add_eos_token_ids(1);
  limits.kv_cache_tokens = 4000;
  return limits;
}

// A request in text format: a prompt of `num_prompt_tokens`, and `rest`.
v1::GenerateRequest RequestOf(int num_prompt_tokens, const std::string& rest) {
  v1::GenerateRequest request;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(rest, &request)) << rest;
  for (int i = 0; i < num_prompt_tokens; ++i) request.add_prompt_token_ids(5);
  return request;
}

std::string Repeated(int count, const std::string& text) {
  std::string repeated;
  for (int i = 0; i < count; ++i) repeated += text + " ";
  return repeated;
}

struct Case {
  int num_prompt_tokens;
  std::string request;
  std::string message;  // part of what the client is told
};

TEST(RequestValidationTest, RefusesPromptsAndLengthsOutOfRange) {
  const std::vector<Case> cases = {
      {3, "request_id: '" + std::string(129, 'x') + "'",
       "request_id must have at most 128 bytes, got 129"},
      {0, "", "prompt_token_ids must have at least 1 token, got 0"},
      {0, "prompt_token_ids: [5, 1000]",
       "prompt_token_ids[1] must be in [0, 999], got 1000: that token id is out of vocabulary"},
      {0, "prompt_token_ids: 4294967295",
       "prompt_token_ids[0] must be in [0, 999], got 4294967295"},
      {3, "max_tokens: 0", "max_tokens must be at least 1, got 0"},
      {3, "max_tokens: 98",
       "You passed 3 input tokens and requested 98 output tokens. However, the model's context "
       "length is only 100 tokens, resulting in a maximum input length of 2 tokens. Please reduce "
       "the length of the input prompt, or max_tokens."},
      {3, "max_tokens: 4294967295",
       "requested 4294967295 output tokens. However, the model's context length is only 100 "
       "tokens, resulting in a maximum input length of 0 tokens"},
      {101, "", "You passed 101 input tokens"},
      {100, "", "You passed 100 input tokens and requested 1 output tokens"},
      {101, "max_tokens: 0 sampling { num_prompt_logprobs: 0 }", "You passed 101 input tokens"},
      {3, "max_tokens: 10 sampling { min_tokens: 11 }",
       "min_tokens must be less than or equal to max_tokens=10, got 11."},
      {3, "sampling { min_tokens: 4294967295 }",
       "min_tokens must be less than or equal to max_tokens=97, got 4294967295."},
  };
  for (const Case& c : cases) {
    const absl::Status status =
        ValidateRequest(RequestOf(c.num_prompt_tokens, c.request), Limits(), 1).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << c.request;
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.message));
  }
}

TEST(RequestValidationTest, RefusesSamplingParametersOutOfRange) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"temperature: -0.1", "temperature must be non-negative, got -0.1."},
      {"temperature: -inf", "temperature must be non-negative, got -inf."},
      {"temperature: 100.5", "temperature must be in [0, 100], got 100.5."},
      {"temperature: nan", "temperature must be in [0, 100], got nan."},
      {"temperature: inf", "temperature must be in [0, 100], got inf."},
      {"top_p: 0", "top_p must be in (0, 1], got 0."},
      {"top_p: 1.5", "top_p must be in (0, 1], got 1.5."},
      {"top_p: -1", "top_p must be in (0, 1], got -1."},
      {"top_p: nan", "top_p must be in (0, 1], got nan."},
      {"min_p: 1.5", "min_p must be in [0, 1], got 1.5."},
      {"min_p: -0.5", "min_p must be in [0, 1], got -0.5."},
      {"min_p: nan", "min_p must be in [0, 1], got nan."},
      {"presence_penalty: 2.5", "presence_penalty must be in [-2, 2], got 2.5."},
      {"presence_penalty: nan", "presence_penalty must be in [-2, 2], got nan."},
      {"frequency_penalty: -2.5", "frequency_penalty must be in [-2, 2], got -2.5."},
      {"frequency_penalty: inf", "frequency_penalty must be in [-2, 2], got inf."},
      {"repetition_penalty: 0", "repetition_penalty must be greater than zero, got 0."},
      {"repetition_penalty: -1", "repetition_penalty must be greater than zero, got -1."},
      {"repetition_penalty: 1e6", "repetition_penalty must be in [0.001, 1000], got 1e+06."},
      {"repetition_penalty: 1e-6", "repetition_penalty must be in [0.001, 1000], got 1e-06."},
      {"repetition_penalty: nan", "repetition_penalty must be in [0.001, 1000], got nan."},
      {"logit_bias { token_id: 4 bias: 100.5 }",
       "logit_bias of token 4 must be in [-100, 100], got 100.5"},
      {"logit_bias { bias: nan }", "logit_bias of token 0 must be in [-100, 100], got nan"},
      {"logit_bias { bias: -inf }", "logit_bias of token 0 must be in [-100, 100], got -inf"},
      {"logit_bias { token_id: 1000 }",
       "token_id of logit_bias must be in [0, 999], got 1000: that token id is out of vocabulary"},
      {"logit_bias { token_id: 8 } logit_bias { token_id: 8 }", "logit_bias names token 8 twice"},
      {Repeated(1025, "logit_bias {}"), "logit_bias must have at most 1024 entries, got 1025"},
      {Repeated(129, "stop_token_ids: 1"), "stop_token_ids must have at most 128 entries, got 129"},
      {"stop_token_ids: 1000", "stop_token_ids[0] must be in [0, 999], got 1000"},
      {"stop_token_ids: [5, 4294967295]", "stop_token_ids[1] must be in [0, 999]"},
      {"allowed_token_ids: 1000", "allowed_token_ids[0] must be in [0, 999], got 1000"},
      {Repeated(8193, "allowed_token_ids: 1"),
       "allowed_token_ids must have at most 8192 entries, got 8193"},
      {"bad_words {}", "a bad word must have 1 to 256 tokens, got 0"},
      {"bad_words { " + Repeated(257, "token_ids: 1") + " }",
       "a bad word must have 1 to 256 tokens, got 257"},
      {"bad_words { token_ids: [5, 1000] }", "token_ids of bad_words[1] must be in [0, 999]"},
      {Repeated(513, "bad_words { token_ids: 1 }"),
       "bad_words must have at most 512 entries, got 513"},
      {"allowed_token_ids: [5, 6] bad_words { token_ids: 5 } bad_words { token_ids: 6 }",
       "bad_words forbids all that allowed_token_ids allows"},
      {"allowed_token_ids: [3, 6] stop_token_ids: 6 min_tokens: 2",
       "allowed_token_ids has nothing but stop tokens, which are not sampled before min_tokens=2"},
      {"num_logprobs: 21",
       "Requested sample logprobs of 21, which is greater than max allowed: 20"},
      {"num_logprobs: 4294967295", "Requested sample logprobs of 4294967295"},
      {"num_prompt_logprobs: 21",
       "Requested prompt logprobs of 21, which is greater than max allowed: 20"},
  };
  for (const auto& [sampling, message] : cases) {
    const absl::Status status =
        ValidateRequest(RequestOf(3, "sampling { " + sampling + " }"), Limits(), 1).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << sampling;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  }
}

TEST(RequestValidationTest, AcceptsWhatIsJustInRange) {
  const std::vector<std::pair<int, std::string>> cases = {
      {1, ""},
      {99, ""},
      {3, "max_tokens: 97"},
      {100, "max_tokens: 0 sampling { num_prompt_logprobs: 0 }"},
      {0, "prompt_token_ids: [0, 999]"},
      {3, "request_id: '" + std::string(128, 'x') + "'"},
      {3, "max_tokens: 10 sampling { min_tokens: 10 }"},
      {3, "sampling { temperature: 0 top_p: 1 top_k: 0 min_p: 0 }"},
      {3, "sampling { temperature: 100 top_p: 1e-9 top_k: 4294967295 min_p: 1 }"},
      {3, "sampling { presence_penalty: -2 frequency_penalty: 2 repetition_penalty: 0.001 }"},
      {3, "sampling { logit_bias { token_id: 999 bias: -100 } logit_bias { bias: 100 } }"},
      {3, "sampling { " + Repeated(128, "stop_token_ids: 999") + " }"},
      {3, "sampling { " + Repeated(8192, "allowed_token_ids: 999") + " }"},
      {3, "sampling { " + Repeated(512, "bad_words { token_ids: 9 token_ids: 8 }") + " }"},
      {3, "sampling { allowed_token_ids: [3, 6] min_tokens: 2 }"},
      {3, "sampling { num_logprobs: 20 num_prompt_logprobs: 20 seed: 18446744073709551615 }"},
  };
  for (const auto& [num_prompt_tokens, text] : cases) {
    const auto validated = ValidateRequest(RequestOf(num_prompt_tokens, text), Limits(), 1);
    EXPECT_TRUE(validated.ok()) << validated.status() << " of " << text;
  }
}

TEST(RequestValidationTest, LeavesNothingToChooseToTheWorkers) {
  v1::GenerateRequest request = RequestOf(3, "");
  request.mutable_sampling()->add_stop_token_ids(9);
  request.mutable_sampling()->add_stop_token_ids(2);
  request.mutable_sampling()->set_top_k(5000);
  const auto validated = ValidateRequest(request, Limits(), 77);
  ASSERT_TRUE(validated.ok()) << validated.status();
  const Request& r = **validated;
  EXPECT_THAT(r.eos_token_ids, ElementsAre(1, 3));
  EXPECT_THAT(r.stop_token_ids, ElementsAre(2, 9));
  EXPECT_THAT(r.sampling.stop_token_ids(), ElementsAre(1, 2, 3, 9));
  EXPECT_EQ(r.sampling.seed(), 77u);
  EXPECT_FALSE(r.sampling.has_top_k()) << "more than the vocabulary is all of it";
}

TEST(RequestValidationTest, KeepsTheClientsSeedAndLetsItIgnoreTheEnd) {
  v1::GenerateRequest request = RequestOf(3, "");
  request.set_ignore_eos(true);
  request.mutable_sampling()->set_seed(0);
  const auto validated = ValidateRequest(request, Limits(), 77);
  ASSERT_TRUE(validated.ok()) << validated.status();
  EXPECT_EQ((*validated)->sampling.seed(), 0u);
  EXPECT_THAT((*validated)->eos_token_ids, IsEmpty());
  EXPECT_THAT((*validated)->sampling.stop_token_ids(), IsEmpty());
}

TEST(RequestValidationTest, FitsRequestsIntoAKvCacheSmallerThanTheModelsLength) {
  ModelLimits limits = Limits();
  limits.kv_cache_tokens = 32;
  v1::GenerateRequest request = RequestOf(3, "");
  request.set_max_tokens(30);
  EXPECT_THAT(std::string(ValidateRequest(request, limits, 1).status().message()),
              HasSubstr("need 33 tokens of KV cache, which holds only 32"));
  request.clear_max_tokens();
  EXPECT_EQ((*ValidateRequest(request, limits, 1))->max_tokens, 29);
}

}  // namespace
}  // namespace fathom
