// The checkpoint's own sampling defaults, used where a request says nothing.
//
// Source: generation_config.json of Hugging Face; which keys count is vLLM's `--generation-config
// auto`.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace fathom {

struct SamplingDefaults {
  float temperature = 1.0f;
  float top_p = 1.0f;
  uint32_t top_k = 0;  // all tokens
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;
};

// Reads `model_dir`/generation_config.json; neutral defaults when there is none. InvalidArgument
// when it is malformed or a value is out of range, naming it.
absl::StatusOr<SamplingDefaults> LoadSamplingDefaults(const std::string& model_dir);

// The same from the text of the file.
absl::StatusOr<SamplingDefaults> ParseSamplingDefaults(const std::string& json);

}  // namespace fathom
