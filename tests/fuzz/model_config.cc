// Any bytes as config.json and generation_config.json (after a zero byte): refused, or numbers that
// the rest of the worker may trust.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "worker/model_config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const size_t end = std::min(text.find('\0'), size);
  const std::string_view rest = text.substr(std::min(end + 1, size));
  const auto config = fathom::ParseModelConfig(text.substr(0, end), rest);
  if (!config.ok()) {
    CHECK(!config.status().message().empty());
    return 0;
  }
  CHECK_GT(config->vocab_size, 0);
  CHECK_GT(config->num_hidden_layers, 0);
  CHECK_GT(config->max_position_embeddings, 0);
  CHECK_GT(config->num_attention_heads, 0);
  CHECK_GT(config->kv_dim(), 0);
  CHECK(std::isfinite(config->SoftmaxScale()) && config->SoftmaxScale() > 0);
  CHECK(std::isfinite(config->rope_theta) && config->rope_theta > 0);
  CHECK(std::is_sorted(config->eos_token_ids.begin(), config->eos_token_ids.end()));
  for (const int id : config->eos_token_ids) CHECK(id >= 0 && id < config->vocab_size);
  CHECK(config->HasDenseLayer() || config->HasMoeLayer());
  return 0;
}
