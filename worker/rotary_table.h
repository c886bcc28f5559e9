// Cosines and sines of the rotary embedding, with YaRN's stretching of low frequencies.
//
// Computed in double and rounded once: at position 163,839 a frequency rounded to float first would
// be off by 1e-2 radians.
//
// Source: YaRN, arXiv 2309.00071 §3; DeepSeek-V3 modeling_deepseek.py,
// DeepseekV3YarnRotaryEmbedding. Thread-safe (pure functions).
#pragma once

#include <vector>

#include "worker/model_config.h"

namespace fathom {

// Radians per position of each pair: [qk_rope_head_dim / 2].
std::vector<double> RotaryFrequencies(const ModelConfig& config);

// [num_positions, qk_rope_head_dim / 2, 2]: cosine, sine; times YaRN's amplitude
// mscale(factor, mscale) / mscale(factor, mscale_all_dim).
std::vector<float> RotaryTable(const ModelConfig& config, int num_positions);

}  // namespace fathom
