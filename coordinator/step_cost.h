// What a step is going to cost, learnt from what earlier ones did.
//
// A step of T tokens of S sequences, where C sums the sequences' lengths (the step's tokens
// included) and P counts the pairs of a token of the step and a token that it attends to, takes
//
//   constant + f(T) + a * S + b * C + c * P
//
// in microseconds, where f grows along a line between any two powers of two. So it bends where a
// model does: few tokens hit few experts, many hit all, and with more still arithmetic outweighs
// the reading of weights. Nothing grows cheaper by being more: all slopes are at least 0.
//
// It remembers the latest steps of each size (powers of two of T and of C), so that the costs of
// prompts are not forgotten while nothing but decoding goes on, and a machine that changes is
// learnt anew. Fitted are all that are remembered, by least squares of the relative errors, with a
// slight preference for slopes of f that are alike where no step tells them apart. By how much the
// latest steps differ from the fit scales every prediction.
//
// Pure state, the same for the same steps; neither clock nor threads. Not thread-safe.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace fathom {

// What a step's cost depends on. (The same as a simulated worker's, worker/sim_profile.h.)
struct StepLoad {
  double tokens = 0;
  double sequences = 0;
  double context_tokens = 0;   // C
  double attention_pairs = 0;  // P

  // One sequence more: `num_tokens` of it, where `num_computed` stand before them.
  void Add(int num_tokens, int num_computed) {
    tokens += num_tokens;
    sequences += 1;
    context_tokens += num_computed + num_tokens;
    attention_pairs += num_tokens * (num_computed + 0.5 * (num_tokens + 1.0));
  }
};

class StepCost {
 public:
  StepCost();

  // A step of that load took `microseconds`.
  void Learn(const StepLoad& load, double microseconds);

  // What a step of that load is going to take, in microseconds; 0 before anything was learnt. It
  // does not fall when any part of the load grows.
  double Predict(const StepLoad& load) const;

  // Of the steps that it was told of, but for the first few: by how much the predictions made for
  // them beforehand were wrong, as a share of what they took.
  double mean_error() const { return mean_error_; }

 private:
  // 1, S, C, P, and the parts of T that lie between powers of two.
  static constexpr int kNumSegments = 18;  // up to 8, 16, …, 2^19 tokens, and beyond
  static constexpr int kNumTerms = 4 + kNumSegments;
  static constexpr int kStepsOfEachSize = 4;

  template <typename T>
  using PerTerm = std::array<T, kNumTerms>;
  using Terms = PerTerm<double>;
  struct Example {
    StepLoad load;
    double microseconds = 0;  // 0: none yet
  };
  struct Size {
    std::array<Example, kStepsOfEachSize> examples;
    int next = 0;
  };

  static Terms TermsOf(const StepLoad& load);
  Size& SizeOf(const StepLoad& load);
  double Fitted(const StepLoad& load) const;
  // Into (+1) or out of (-1) the sums.
  void Count(const Example& example, double sign);
  void Fit();

  std::vector<Size> sizes_;  // by the powers of two of T and C
  // Sums over the examples: of products of two terms, and of terms; each relative to its time.
  PerTerm<Terms> products_ = {};
  Terms sums_ = {};
  Terms slopes_ = {};               // what was fitted
  PerTerm<bool> is_positive_ = {};  // which of them are not 0
  int64_t num_learnt_ = 0;
  double drift_ = 1;  // latest times over fitted ones
  double mean_error_ = 0;
};

}  // namespace fathom
