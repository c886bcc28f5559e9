#include "worker/rotary_table.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numbers>

namespace fathom {
namespace {

// The index of the pair, as a fraction, that turns `rotations` times over the trained context.
double PairThatTurns(double rotations, const ModelConfig& config) {
  const double context = config.yarn->original_max_position_embeddings;
  return config.qk_rope_head_dim * std::log(context / (rotations * 2.0 * std::numbers::pi)) /
         (2.0 * std::log(config.rope_theta));
}

}  // namespace

std::vector<double> RotaryFrequencies(const ModelConfig& config) {
  const int rope_dim = config.qk_rope_head_dim;
  std::vector<double> frequencies(rope_dim / 2);
  for (int pair = 0; pair < rope_dim / 2; ++pair) {
    frequencies[pair] = std::pow(config.rope_theta, -2.0 * pair / rope_dim);
  }
  if (!config.yarn.has_value()) return frequencies;

  // Pairs that turn often keep their frequency, slow ones are divided by the factor, and between
  // the two a ramp leads over.
  const double low = std::max(std::floor(PairThatTurns(config.yarn->beta_fast, config)), 0.0);
  double high = std::min(std::ceil(PairThatTurns(config.yarn->beta_slow, config)), rope_dim - 1.0);
  if (low == high) high += 0.001;
  for (int pair = 0; pair < rope_dim / 2; ++pair) {
    const double stretched = std::clamp((pair - low) / (high - low), 0.0, 1.0);
    frequencies[pair] *= 1.0 - stretched + stretched / config.yarn->factor;
  }
  return frequencies;
}

std::vector<float> RotaryTable(const ModelConfig& config, int num_positions) {
  double amplitude = 1.0;
  if (config.yarn.has_value()) {
    amplitude = YarnMscale(config.yarn->factor, config.yarn->mscale) /
                YarnMscale(config.yarn->factor, config.yarn->mscale_all_dim);
  }
  const std::vector<double> frequencies = RotaryFrequencies(config);
  std::vector<float> table;
  table.reserve(size_t{2} * num_positions * frequencies.size());
  for (int position = 0; position < num_positions; ++position) {
    for (const double frequency : frequencies) {
      const double angle = position * frequency;
      table.push_back(static_cast<float>(amplitude * std::cos(angle)));
      table.push_back(static_cast<float>(amplitude * std::sin(angle)));
    }
  }
  return table;
}

}  // namespace fathom
