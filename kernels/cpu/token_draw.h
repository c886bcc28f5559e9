// One row of logits to a token on the host, in F64: stages 4 to 6 of worker/sampler.h.
//
// Not thread-safe (keeps scratch memory).
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/ops.h"

namespace fathom {

class TokenDraw {
 public:
  // A token; -1 when a logit is faulty or nothing is left to choose.
  //   logits [vocab_size]; logit_row of `how` is not looked at
  int32_t Draw(const float* logits, int32_t vocab_size, const SamplingRow& how);

 private:
  struct Candidate {
    int32_t token_id;
    float logit;
    double weight;  // probability relative to the best token's
  };
  static bool IsBetter(const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token_id < b.token_id;
  }

  void CollectAll(const float* logits, int32_t vocab_size);
  void CollectTopK(const float* logits, int32_t vocab_size, int32_t top_k);
  void KeepTopP(double top_p);
  int32_t DrawCandidate(double uniform);

  std::vector<Candidate> candidates_;
  std::vector<Candidate> ranked_;
};

}  // namespace fathom
