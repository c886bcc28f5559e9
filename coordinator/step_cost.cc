#include "coordinator/step_cost.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <tuple>

#include "base/check.h"

namespace fathom {
namespace {

constexpr int kConstant = 0, kSequences = 1, kContextTokens = 2, kPairs = 3, kFirstSegment = 4;
constexpr int kNumTokenSizes = 21;    // up to 2^20 tokens in a step
constexpr int kNumContextSizes = 32;  // and 2^31 before them

// The fit is made after every step while little is known, then after some.
constexpr int64_t kStepsOfEveryFit = 128;
constexpr int64_t kStepsBetweenFits = 8;
constexpr int64_t kStepsBeforeErrorsCount = 16;
constexpr double kNewestErrorShare = 0.01;
constexpr double kNewestDriftShare = 0.05;

// What it is worth that neighbouring slopes differ by so many microseconds per token: far less than
// a step says that tells them apart.
constexpr double kWorthOfSmoothness = 1e-12;
// Of the diagonal, where all are 1: keeps the factorisation away from 0.
constexpr double kRidge = 1e-9;

int PowerOfTwo(double number, int num_powers) {
  const auto whole = static_cast<uint64_t>(std::max(1.0, number));
  return std::min(static_cast<int>(std::bit_width(whole)) - 1, num_powers - 1);
}

// Solves the equations of those terms that are `chosen`, by Cholesky's factorisation; 0 elsewhere.
template <typename Matrix, typename Vector, typename Choice>
Vector Solve(const Matrix& matrix, const Vector& target, const Choice& chosen) {
  std::array<int, std::tuple_size_v<Vector>> places;
  int count = 0;
  for (int i = 0; i < static_cast<int>(chosen.size()); ++i) {
    if (chosen[i]) places[count++] = i;
  }
  Matrix lower;
  Vector y;
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j <= i; ++j) {
      double sum = matrix[places[i]][places[j]];
      for (int k = 0; k < j; ++k) sum -= lower[i][k] * lower[j][k];
      lower[i][j] = i == j ? std::sqrt(std::max(sum, kRidge)) : sum / lower[j][j];
    }
    double sum = target[places[i]];
    for (int k = 0; k < i; ++k) sum -= lower[i][k] * y[k];
    y[i] = sum / lower[i][i];
  }
  Vector solution = {};
  for (int i = count - 1; i >= 0; --i) {
    double sum = y[i];
    for (int k = i + 1; k < count; ++k) sum -= lower[k][i] * solution[places[k]];
    solution[places[i]] = sum / lower[i][i];
  }
  return solution;
}

}  // namespace

StepCost::StepCost() : sizes_(kNumTokenSizes * kNumContextSizes) {}

StepCost::Terms StepCost::TermsOf(const StepLoad& load) {
  Terms terms = {};
  terms[kConstant] = 1;
  terms[kSequences] = load.sequences;
  terms[kContextTokens] = load.context_tokens;
  terms[kPairs] = load.attention_pairs;
  double begin = 0;
  double end = 8;
  for (int i = 0; i < kNumSegments && load.tokens > begin; ++i) {
    const bool is_last = i + 1 == kNumSegments;
    terms[kFirstSegment + i] = (is_last ? load.tokens : std::min(load.tokens, end)) - begin;
    begin = end;
    end *= 2;
  }
  return terms;
}

StepCost::Size& StepCost::SizeOf(const StepLoad& load) {
  return sizes_[PowerOfTwo(load.tokens, kNumTokenSizes) * kNumContextSizes +
                PowerOfTwo(load.context_tokens, kNumContextSizes)];
}

double StepCost::Predict(const StepLoad& load) const { return drift_ * Fitted(load); }

double StepCost::Fitted(const StepLoad& load) const {
  const Terms terms = TermsOf(load);
  double microseconds = 0;
  for (int i = 0; i < kNumTerms; ++i) microseconds += terms[i] * slopes_[i];
  return microseconds;
}

void StepCost::Learn(const StepLoad& load, double microseconds) {
  CHECK(std::isfinite(microseconds)) << microseconds;
  if (load.tokens <= 0 || microseconds <= 0) return;
  if (num_learnt_ >= kStepsBeforeErrorsCount) {
    const double fitted = std::max(Fitted(load), 1e-3);
    const double error = std::abs(drift_ * fitted - microseconds) / microseconds;
    mean_error_ += kNewestErrorShare * (error - mean_error_);
    // One strange step must not count for much.
    const double ratio = std::clamp(microseconds / fitted, drift_ / 2, drift_ * 2);
    drift_ += kNewestDriftShare * (ratio - drift_);
  }
  Size& size = SizeOf(load);
  Example& oldest = size.examples[size.next];
  size.next = (size.next + 1) % kStepsOfEachSize;
  if (oldest.microseconds > 0) Count(oldest, -1);
  oldest = {.load = load, .microseconds = microseconds};
  Count(oldest, +1);
  ++num_learnt_;
  if (num_learnt_ < kStepsOfEveryFit || num_learnt_ % kStepsBetweenFits == 0) Fit();
}

void StepCost::Count(const Example& example, double sign) {
  Terms terms = TermsOf(example.load);
  for (double& term : terms) term /= example.microseconds;
  for (int i = 0; i < kNumTerms; ++i) {
    if (terms[i] == 0) continue;
    sums_[i] += sign * terms[i];
    for (int j = 0; j < kNumTerms; ++j) products_[i][j] += sign * terms[i] * terms[j];
  }
}

// Lawson and Hanson's active sets: the slopes that are not 0 solve the normal equations among
// themselves; one that would become negative is held at 0, one that 0 holds back is let go. Most
// fits begin with the right set, that of the last one.
void StepCost::Fit() {
  // Everything is scaled to a diagonal of 1.
  PerTerm<Terms> matrix = products_;
  for (int i = kFirstSegment; i + 1 < kNumTerms; ++i) {
    matrix[i][i] += kWorthOfSmoothness;
    matrix[i + 1][i + 1] += kWorthOfSmoothness;
    matrix[i][i + 1] -= kWorthOfSmoothness;
    matrix[i + 1][i] -= kWorthOfSmoothness;
  }
  Terms scale, target, solution;
  for (int i = 0; i < kNumTerms; ++i) scale[i] = 1 / std::sqrt(std::max(matrix[i][i], 1e-300));
  for (int i = 0; i < kNumTerms; ++i) {
    for (int j = 0; j < kNumTerms; ++j) matrix[i][j] *= scale[i] * scale[j];
    matrix[i][i] += kRidge;
    target[i] = sums_[i] * scale[i];
    solution[i] = is_positive_[i] ? slopes_[i] / scale[i] : 0;
  }

  constexpr int kMostRounds = 3 * kNumTerms;
  for (int round = 0; round < kMostRounds; ++round) {
    const Terms wanted = Solve(matrix, target, is_positive_);
    // As far towards it as no slope becomes negative.
    double share = 1;
    for (int i = 0; i < kNumTerms; ++i) {
      if (is_positive_[i] && wanted[i] < 0) {
        share = std::min(share, solution[i] / (solution[i] - wanted[i]));
      }
    }
    bool is_held_back = false;
    for (int i = 0; i < kNumTerms; ++i) {
      if (!is_positive_[i]) continue;
      solution[i] += share * (wanted[i] - solution[i]);
      if (wanted[i] < 0 && solution[i] <= 1e-12 * std::abs(wanted[i])) {
        solution[i] = 0;
        is_positive_[i] = false;
        is_held_back = true;
      }
    }
    if (is_held_back) continue;
    int best = -1;
    double best_gain = 1e-9;
    for (int i = 0; i < kNumTerms; ++i) {
      if (is_positive_[i]) continue;
      double gain = target[i];
      for (int j = 0; j < kNumTerms; ++j) gain -= matrix[i][j] * solution[j];
      if (gain > best_gain) {
        best = i;
        best_gain = gain;
      }
    }
    if (best < 0) break;
    is_positive_[best] = true;
  }
  for (int i = 0; i < kNumTerms; ++i) slopes_[i] = solution[i] * scale[i];
}

}  // namespace fathom
