// GenerateRequest → Request: every field is checked, whoever sent it.
//
// Messages have vLLM's words where it has some (vllm/sampling_params.py), else they say
// "X must be in [a, b], got Y". Pure functions, thread-safe.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "coordinator/request.h"
#include "coordinator/status_board.h"
#include "proto/generate.pb.h"

namespace fathom {

inline constexpr int kMaxRequestIdBytes = 128;
inline constexpr int kMaxCacheSaltBytes = 256;
inline constexpr uint32_t kMaxQueueMilliseconds = 86'400'000;
inline constexpr size_t kMaxGrammarTextBytes = size_t{64} << 10;
inline constexpr int kMaxLogprobs = 20;  // vLLM's --max-logprobs
inline constexpr int kMaxLogitBiases = 1024;
inline constexpr int kMaxStopTokenIds = 128;
inline constexpr int kMaxAllowedTokenIds = 8192;
inline constexpr int kMaxBadWords = 512;
inline constexpr int kMaxBadWordTokens = 256;
inline constexpr float kMaxTemperature = 100;
inline constexpr float kMinRepetitionPenalty = 1e-3f;  // beyond these a logit may overflow
inline constexpr float kMaxRepetitionPenalty = 1e3f;

// `default_seed` is used when the request brings none. InvalidArgument says which field is wrong,
// what it was and what was expected.
absl::StatusOr<std::shared_ptr<const Request>> ValidateRequest(const v1::GenerateRequest& request,
                                                               const ModelLimits& limits,
                                                               uint64_t default_seed);

}  // namespace fathom
