// How long the steps of a simulated worker take, and how many tokens its KV cache holds: a JSON
// file, such as those in bench/profiles/.
//
// A step of T tokens of S sequences takes, in microseconds,
//
//   fixed_us + T * us_per_token + S * us_per_sequence + C * us_per_context_token
//
// where C sums the sequences' lengths, the step's tokens included; and with a `roofline`, besides,
//
//   max(weights / memory, T * linear_flops_per_token / linear_flops_per_second)
//   + max(C * kv_bytes_per_token / memory, P * attention_flops_per_pair /
//   attention_flops_per_second)
//
// where memory is memory_bytes_per_second, P counts the pairs of a token of the step and a token
// that it attends to, and weights is what the step must read:
//
//   weight_bytes + expert_bytes * num_experts * (1 - (1 - num_experts_per_token / num_experts)^T)
//
// which is how many experts are hit at least once when tokens choose independently.
//
// Pure functions, thread-safe.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace fathom {

// All numbers are finite and not negative, those after "per second" positive.
struct SimRoofline {
  double memory_bytes_per_second = 0;
  double weight_bytes = 0;  // read in every step
  double expert_bytes = 0;  // one expert's, all layers
  double num_experts = 0;
  double num_experts_per_token = 0;  // at most num_experts
  double kv_bytes_per_token = 0;
  double linear_flops_per_token = 0;
  double linear_flops_per_second = 0;
  double attention_flops_per_pair = 0;
  double attention_flops_per_second = 0;
};

struct SimProfile {
  int64_t kv_cache_tokens = 0;
  double fixed_us = 0;
  double us_per_token = 0;
  double us_per_sequence = 0;
  double us_per_context_token = 0;
  std::optional<SimRoofline> roofline = std::nullopt;
};

// What a step's time depends on.
struct SimStep {
  double tokens = 0;
  double sequences = 0;
  double context_tokens = 0;   // C
  double attention_pairs = 0;  // P
};

double StepMicroseconds(const SimProfile& profile, const SimStep& step);

// Every key is required but `description` and `roofline`; others are refused. InvalidArgument says
// in one line which key is wrong and what was expected.
absl::StatusOr<SimProfile> ParseSimProfile(std::string_view json);

}  // namespace fathom
