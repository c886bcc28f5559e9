// Logits to token ids, a block per row: the draw of worker/sampler.h with sums in fixed point, so
// that the order of additions, and with it the number of threads, does not matter.
//
// The tokens that stay after top_k, min_p and top_p are always the best so many (ties: lower ids
// first), so each of the three is a "prefix" of that order: a key and how many of those equal to
// it. A prefix is found digit by digit in a histogram of the keys, weighted by counts or by
// probabilities.

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/token_sampler.h"
#include "kernels/shape_checks.h"

namespace fathom {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int kBits = 44;
constexpr float kOne = 0x1p44f;  // weight 1 in fixed point; sums of 2^19 of them fit

constexpr double kLog2E = 1.4426950408889634;

using Fixed = unsigned long long;
using Scan = cub::BlockScan<Fixed, kThreads>;

// The best tokens: all with a key above, and the first `ties` of those with this one.
struct Prefix {
  uint32_t key;
  int ties;
};

struct Best {
  float logit;
  int token_id;
  bool faulty;
};

struct SharedMemory {
  union {
    Scan::TempStorage scan;
    cub::BlockReduce<Best, kThreads>::TempStorage best;
  };
  Fixed bins[kBins];
  Fixed warp_sums[kWarps];
  int warp_ties[kWarps];
  Best row_best;
  Fixed before;  // of the digit that was chosen
  uint32_t digit;
  bool found;
  int token_id;
};

// Calls fn(id, logit) for begin, begin + stride, … below end. Several loads are under way at once:
// what a row costs is their latency.
template <typename Fn>
__device__ void ForEachLogit(const float* logits, int begin, int end, int stride, Fn fn) {
  constexpr int kAtOnce = 16;
  for (int first = begin; first < end; first += kAtOnce * stride) {
    float values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int id = first + i * stride;
      values[i] = id < end ? logits[id] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int id = first + i * stride;
      if (id < end) fn(id, values[i]);
    }
  }
}

// Orders like the floats; -0 + 0 is 0, which -0 equals.
__device__ uint32_t KeyOf(float logit) {
  const uint32_t bits = __float_as_uint(__fadd_rn(logit, 0.0f));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Row {
  const float* logits;
  int vocab_size;
  SamplingRow how;
  float best_logit;
  float least_weight;
  double exponent_scale;  // of logits, for powers of two

  // Probability relative to the best token's, 0 below min_p. Right to 2^-22: the whole part of the
  // exponent is split off in double, which costs a tenth of exp in double.
  __device__ Fixed Weight(float logit) const {
    const double exponent = (static_cast<double>(logit) - best_logit) * exponent_scale;
    if (exponent < -kBits) return 0;
    const double whole = rint(exponent);
    const float weight =
        ldexpf(exp2f(static_cast<float>(exponent - whole)), static_cast<int>(whole));
    return weight < least_weight ? 0 : static_cast<Fixed>(weight * kOne);
  }
};

__device__ Best Better(const Best& a, const Best& b) {
  const bool first = a.logit > b.logit || (a.logit == b.logit && a.token_id < b.token_id);
  Best best = first ? a : b;
  best.faulty = a.faulty || b.faulty;
  return best;
}

__device__ Best FindBest(const Row& row, SharedMemory& shared) {
  Best best = {-INFINITY, row.vocab_size, false};
  ForEachLogit(row.logits, threadIdx.x, row.vocab_size, kThreads, [&](int id, float logit) {
    const bool faulty = !(logit < INFINITY) || (logit == -INFINITY && !row.how.may_ban);
    best = Better(best, {logit, id, faulty});
  });
  best =
      cub::BlockReduce<Best, kThreads>(shared.best).Reduce(best, [](const Best& a, const Best& b) {
        return Better(a, b);
      });
  if (threadIdx.x == 0) shared.row_best = best;
  __syncthreads();
  return shared.row_best;
}

// The shortest prefix whose measures add up to `enough`, among keys above `floor`; shared.found
// says whether there is one, else shared.before is the sum of all. measure(logit) is the same for
// equal logits.
template <typename Measure>
__device__ Prefix FindPrefix(const Row& row, Fixed enough, uint32_t floor, SharedMemory& shared,
                             Measure measure) {
  uint32_t known = 0, mask = 0;  // the digits that are decided
  Fixed before = 0;              // of keys above them
  for (int shift = 32 - kDigitBits;; shift -= kDigitBits) {
    const int width = shift < 0 ? kDigitBits + shift : kDigitBits;
    const int low = max(shift, 0);
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared.bins[i] = 0;
    __syncthreads();
    ForEachLogit(row.logits, threadIdx.x, row.vocab_size, kThreads, [&](int, float logit) {
      const uint32_t key = KeyOf(logit);
      if (key <= floor || (key & mask) != known) return;
      const Fixed value = measure(logit);
      if (value != 0) atomicAdd(&shared.bins[key >> low & ((1u << width) - 1)], value);
    });
    __syncthreads();
    // From the largest digit down: which one reaches `enough`?
    Fixed own[kBinsPerThread], above[kBinsPerThread], total;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      own[i] = shared.bins[kBins - 1 - (threadIdx.x * kBinsPerThread + i)];
    }
    Scan(shared.scan).ExclusiveSum(own, above, total);
    if (threadIdx.x == 0) {
      shared.found = before + total >= enough;
      if (!shared.found) shared.before = before + total;
    }
    __syncthreads();
    if (!shared.found) return {floor, 0};
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      if (own[i] != 0 && before + above[i] < enough && before + above[i] + own[i] >= enough) {
        shared.before = before + above[i];
        shared.digit = kBins - 1 - (threadIdx.x * kBinsPerThread + i);
      }
    }
    __syncthreads();
    before = shared.before;
    known |= shared.digit << low;
    mask |= ((1u << width) - 1) << low;
    __syncthreads();
    if (low == 0) break;
  }
  const uint32_t bits = known & 0x80000000u ? known & 0x7FFFFFFFu : ~known;
  const Fixed each = measure(__uint_as_float(bits));
  return {known, static_cast<int>((enough - before + each - 1) / each)};
}

// The prefix that top_k, then min_p, then top_p leave.
__device__ Prefix KeptPrefix(const Row& row, SharedMemory& shared) {
  Prefix kept = {0, 0};  // everything: no key is 0
  if (row.how.top_k > 0 && row.how.top_k < row.vocab_size) {
    kept = FindPrefix(row, row.how.top_k, 0, shared, [](float) { return Fixed{1}; });
  }
  if (row.how.top_p >= 1.0f) return kept;

  const uint32_t last_bits = kept.key & 0x80000000u ? kept.key & 0x7FFFFFFFu : ~kept.key;
  const Fixed last_weight = kept.key == 0 ? 0 : row.Weight(__uint_as_float(last_bits));
  Fixed sum = 0;
  ForEachLogit(row.logits, threadIdx.x, row.vocab_size, kThreads, [&](int, float logit) {
    if (KeyOf(logit) > kept.key) sum += row.Weight(logit);
  });
  Fixed exclusive, total;
  Scan(shared.scan).ExclusiveSum(sum, exclusive, total);
  __syncthreads();
  total += last_weight * kept.ties;
  const Fixed enough = max(Fixed{1}, static_cast<Fixed>(ceil(static_cast<double>(row.how.top_p) *
                                                             static_cast<double>(total))));
  const Prefix above =
      FindPrefix(row, enough, kept.key, shared, [&row](float logit) { return row.Weight(logit); });
  if (shared.found) return above;
  // The keys above those that tie for the last place of top_k are not enough: some of these, then.
  if (last_weight == 0) return kept;
  const Fixed missing = enough > shared.before ? enough - shared.before : 1;
  return {kept.key, min(kept.ties, static_cast<int>((missing + last_weight - 1) / last_weight))};
}

// Weight of a token within the prefix, given how many before it tie with its last key.
__device__ Fixed KeptWeight(const Row& row, const Prefix& kept, float logit, int ties_before) {
  const uint32_t key = KeyOf(logit);
  const bool stays = key > kept.key || (key == kept.key && ties_before < kept.ties);
  return stays ? row.Weight(logit) : 0;
}

// Draws in the order of ids. Each warp has a contiguous part of the vocabulary.
__device__ int Draw(const Row& row, const Prefix& kept, SharedMemory& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int part = (row.vocab_size + kThreads - 1) / kThreads * 32;
  const int begin = min(warp * part, row.vocab_size);
  const int end = min(begin + part, row.vocab_size);
  const unsigned lanes_before = (1u << lane) - 1;

  int ties = 0;
  ForEachLogit(row.logits, begin + lane, end, 32,
               [&](int, float logit) { ties += KeyOf(logit) == kept.key ? 1 : 0; });
  for (int lanes = 16; lanes > 0; lanes /= 2) ties += __shfl_xor_sync(~0u, ties, lanes);
  if (lane == 0) shared.warp_ties[warp] = ties;
  __syncthreads();
  int ties_before = 0;
  for (int w = 0; w < warp; ++w) ties_before += shared.warp_ties[w];

  // Calls fn(id, weight) for 32 ids at once, until it says false.
  const auto visit = [&](auto fn) {
    constexpr int kAtOnce = 16;
    int counted = ties_before;
    for (int first = begin; first < end; first += 32 * kAtOnce) {
      float values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int id = first + 32 * i + lane;
        values[i] = id < end ? row.logits[id] : -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int id = first + 32 * i + lane;
        const unsigned equal = __ballot_sync(~0u, id < end && KeyOf(values[i]) == kept.key);
        const int rank = counted + __popc(equal & lanes_before);
        const Fixed weight = id < end ? KeptWeight(row, kept, values[i], rank) : 0;
        counted += __popc(equal);
        if (!fn(id, weight)) return;
      }
    }
  };
  Fixed sum = 0;
  visit([&](int, Fixed weight) {
    sum += weight;
    return true;
  });
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (lane == 0) shared.warp_sums[warp] = sum;
  __syncthreads();
  Fixed total = 0, before = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = total;
    total += shared.warp_sums[w];
  }
  // uniform is a multiple of 2^-53; the product is exact.
  const auto numerator = static_cast<Fixed>(row.how.uniform * 0x1p53);
  const Fixed target = __umul64hi(numerator, total) << 11 | numerator * total >> 53;
  if (target >= before && target < before + sum) {
    Fixed cumulative = before;
    visit([&](int id, Fixed weight) {
      Fixed inclusive = weight;
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        const Fixed other = __shfl_up_sync(~0u, inclusive, lanes);
        if (lane >= lanes) inclusive += other;
      }
      inclusive += cumulative;
      const unsigned reached = __ballot_sync(~0u, inclusive > target);
      if (reached != 0) {
        if (lane == __ffs(reached) - 1) shared.token_id = id;
        return false;
      }
      cumulative = __shfl_sync(~0u, inclusive, 31);
      return true;
    });
  }
  __syncthreads();
  return shared.token_id;
}

__global__ __launch_bounds__(kThreads) void SampleKernel(const float* logits, int64_t stride,
                                                         int vocab_size, const SamplingRow* rows,
                                                         int* token_ids) {
  __shared__ SharedMemory shared;
  Row row = {};
  row.how = rows[blockIdx.x];
  row.logits = logits + row.how.logit_row * stride;
  row.vocab_size = vocab_size;
  const Best best = FindBest(row, shared);
  __syncthreads();
  int token_id = best.token_id;
  if (best.faulty || best.logit == -INFINITY) {
    token_id = -1;
  } else if (row.how.inverse_temperature > 0.0 && row.how.top_k != 1) {
    row.best_logit = best.logit;
    row.least_weight = row.how.min_p;
    row.exponent_scale = row.how.inverse_temperature * kLog2E;
    token_id = Draw(row, KeptPrefix(row, shared), shared);
  }
  if (threadIdx.x == 0) token_ids[blockIdx.x] = token_id;
}

}  // namespace

void SampleTokens(const float* logits, int64_t stride, int vocab_size, const SamplingRow* rows,
                  int num_rows, int* token_ids, cudaStream_t stream) {
  if (num_rows == 0) return;
  SampleKernel<<<num_rows, kThreads, 0, stream>>>(logits, stride, vocab_size, rows, token_ids);
  CUDA_CHECK(cudaGetLastError());
}

void CudaOps::SampleTokens(const Tensor& logits, const Tensor& rows, const Tensor& tokens) {
  CheckSampleTokens(logits, rows, tokens);
  fathom::SampleTokens(logits.data<float>(), logits.stride(0), static_cast<int>(logits.dim(1)),
                       static_cast<const SamplingRow*>(rows.raw()), static_cast<int>(tokens.dim(0)),
                       tokens.data<int32_t>(), stream_);
}

}  // namespace fathom
