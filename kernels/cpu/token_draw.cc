#include "kernels/cpu/token_draw.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>
#include <limits>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/shape_checks.h"

namespace fathom {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

bool HasFault(const float* logits, int32_t vocab_size, bool may_ban) {
  bool found = false;
  for (int32_t id = 0; id < vocab_size; ++id) {
    found |= logits[id] >= kInfinity || logits[id] != logits[id] ||
             (logits[id] == -kInfinity && !may_ban);
  }
  return found;
}

// The first of the largest.
int32_t ArgMax(const float* logits, int32_t vocab_size) {
  int32_t best = 0;
  for (int32_t id = 1; id < vocab_size; ++id) {
    if (logits[id] > logits[best]) best = id;
  }
  return best;
}

}  // namespace

int32_t TokenDraw::Draw(const float* logits, int32_t vocab_size, const SamplingRow& how) {
  if (HasFault(logits, vocab_size, how.may_ban != 0)) return -1;
  const int32_t best = ArgMax(logits, vocab_size);
  if (logits[best] == -kInfinity) return -1;
  if (how.inverse_temperature == 0.0 || how.top_k == 1) return best;

  // min_p and top_k both keep a run of the best tokens, so their order does not matter; this one
  // computes fewer exponentials.
  if (how.top_k > 0) {
    CollectTopK(logits, vocab_size, how.top_k);
  } else {
    CollectAll(logits, vocab_size);
  }
  for (Candidate& candidate : candidates_) {
    candidate.weight =
        std::exp((static_cast<double>(candidate.logit) - logits[best]) * how.inverse_temperature);
  }
  const double least_weight = std::max<double>(how.min_p, std::numeric_limits<double>::min());
  std::erase_if(candidates_, [&](const Candidate& c) { return c.weight < least_weight; });
  if (how.top_p < 1.0f) KeepTopP(how.top_p);
  return DrawCandidate(how.uniform);
}

int32_t TokenDraw::DrawCandidate(double uniform) {
  // In the order of ids, so that rounding does not depend on how the best ones were found.
  const auto by_id = [](const Candidate& a, const Candidate& b) { return a.token_id < b.token_id; };
  if (!std::is_sorted(candidates_.begin(), candidates_.end(), by_id)) {
    std::sort(candidates_.begin(), candidates_.end(), by_id);
  }
  double total = 0.0;
  for (const Candidate& candidate : candidates_) total += candidate.weight;
  const double target = uniform * total;
  double cumulative = 0.0;
  for (const Candidate& candidate : candidates_) {
    cumulative += candidate.weight;
    if (target < cumulative) return candidate.token_id;
  }
  return candidates_.back().token_id;
}

void TokenDraw::CollectAll(const float* logits, int32_t vocab_size) {
  candidates_.resize(vocab_size);
  for (int32_t id = 0; id < vocab_size; ++id) candidates_[id] = {id, logits[id], 0.0};
}

void TokenDraw::CollectTopK(const float* logits, int32_t vocab_size, int32_t top_k) {
  const int32_t num_kept = std::min(top_k, vocab_size);
  candidates_.resize(num_kept);
  for (int32_t id = 0; id < num_kept; ++id) candidates_[id] = {id, logits[id], 0.0};
  // A heap with the worst one in front. Ids ascend, so who ties with it is worse.
  std::make_heap(candidates_.begin(), candidates_.end(), IsBetter);
  for (int32_t id = num_kept; id < vocab_size; ++id) {
    if (logits[id] <= candidates_.front().logit) continue;
    std::pop_heap(candidates_.begin(), candidates_.end(), IsBetter);
    candidates_.back() = {id, logits[id], 0.0};
    std::push_heap(candidates_.begin(), candidates_.end(), IsBetter);
  }
}

void TokenDraw::KeepTopP(double top_p) {
  double total = 0.0;
  for (const Candidate& candidate : candidates_) total += candidate.weight;
  const double enough = top_p * total;

  // All tokens below this weight together weigh less than 1 - top_p of the total, so the choice
  // never reaches them. Halved against rounding.
  const double hopeless = 0.5 * (1.0 - top_p) * total / static_cast<double>(candidates_.size());
  ranked_.clear();
  std::copy_if(candidates_.begin(), candidates_.end(), std::back_inserter(ranked_),
               [&](const Candidate& c) { return c.weight >= hopeless; });

  // Halves the range in which the last kept token lies until it is worth sorting: everything before
  // `first` is kept, and nothing from `last` on.
  constexpr ptrdiff_t kWorthSorting = 32;
  auto first = ranked_.begin();
  auto last = ranked_.end();
  double before = 0.0;
  while (last - first > kWorthSorting) {
    const auto middle = first + (last - first) / 2;
    std::nth_element(first, middle, last, IsBetter);
    double half = 0.0;
    for (auto candidate = first; candidate != middle; ++candidate) half += candidate->weight;
    if (before + half >= enough) {
      last = middle;
    } else {
      before += half;
      first = middle;
    }
  }
  std::sort(first, last, IsBetter);
  while (first != last && (first == ranked_.begin() || before < enough)) {
    before += first->weight;
    ++first;
  }
  const auto worst = std::max_element(ranked_.begin(), first, IsBetter);
  std::erase_if(candidates_, [&](const Candidate& c) { return IsBetter(*worst, c); });
}

void CpuOps::SampleTokens(const Tensor& logits, const Tensor& rows, const Tensor& tokens) {
  CheckSampleTokens(logits, rows, tokens);
  const auto* how = static_cast<const SamplingRow*>(rows.raw());
  threads_.ParallelFor(tokens.dim(0), 1, [&](int, int64_t begin, int64_t end) {
    TokenDraw draw;
    for (int64_t i = begin; i < end; ++i) {
      const Tensor row = logits[how[i].logit_row];
      tokens.data<int32_t>()[i] =
          draw.Draw(row.data<float>(), static_cast<int32_t>(row.dim(0)), how[i]);
    }
  });
}

}  // namespace fathom
