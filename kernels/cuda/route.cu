// The router, from activations to sorted rows, in one launch for few tokens and in two for many.
//
// Few tokens: the gate (3.7 MB for DeepSeek-V3) is streamed by all multiprocessors at once. A block
// has 32 experts and 448 inputs, in registers before the activations are there, and leaves partial
// logits; one block per token adds the parts up in order and chooses, and another sorts the rows of
// up to 16 tokens, or the last to choose those of more. All blocks are resident, so they may wait
// for each other. Parts and choices go through slots that hold kNothing until they are written, and
// whoever reads one puts that back: data and signal are the same bytes, one trip through the L2.
//
// Many tokens: logits by RouterSm90, MultiplyBf16 or any linear layer, whose parts the next kernel
// adds up before a warp per token chooses; then all blocks sort the rows together.

#include <algorithm>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/expert_choice.cuh"
#include "kernels/cuda/expert_groups.cuh"
#include "kernels/cuda/linear_bf16.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/router_sm90.h"
#include "kernels/shape_checks.h"

namespace fathom {
namespace cuda {
namespace {

// --- few tokens

constexpr int kBlockExperts = 32;
constexpr int kExpertTiles = kBlockExperts / 16;
constexpr int kInputWarps = 7;                                // that share the inputs of a block
constexpr int kWarpChunks = 2;                                // of 32 inputs, of a warp
constexpr int kBlockInputs = kInputWarps * kWarpChunks * 32;  // 448 = 7168 / 16
constexpr int kStreamThreads = kInputWarps * kExpertTiles * kWarp;
constexpr int kMostStreamTokens = 64;
constexpr int kSumStride = 36;  // floats between tokens of a warp's sums: no two lanes in a bank
constexpr int kMostStreamExperts = 512;
constexpr int kFewTokens = 16;  // whose rows of an expert are one chunk
constexpr int kChosenSlots = kFewTokens * 2 * kMostChoices;

struct RouteArguments {
  Rows<const __nv_bfloat16> x;
  const __nv_bfloat16* gate;  // [E, H]
  int num_tokens, hidden_size;
  uint32_t* parts;    // [slices][T][E] slots
  uint32_t* chosen;   // [T][k] slots, of few rows
  int* counters;      // [2], zero before and after
  int* block_counts;  // of many tokens, GroupRowsTogether
  Rows<float> logits;
  Choice choice;
  Grouping grouping;
};

// Whether this block is the last of `count` to come here. What the blocks wrote before is visible
// to the last. All threads.
__device__ bool IsLastArrival(int* counter, int count, bool* room) {
  __syncthreads();
  if (threadIdx.x == 0) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(counter)
                 : "memory");
    *room = before == count - 1;
  }
  __syncthreads();
  return *room;
}

// --- slots

constexpr uint32_t kNothing = ~0u;  // no choice, and a NaN that no arithmetic produces

__device__ void StoreSlot(uint32_t* slot, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(slot), "r"(value) : "memory");
}
__device__ uint32_t LoadSlot(const uint32_t* slot) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(slot) : "memory");
  return value;
}
// Waits for `count` slots, at most kMost, `stride` apart, and empties them; what is not there is 0.
template <int kMost>
__device__ void TakeSlots(uint32_t* slots, int count, int64_t stride, uint32_t (&values)[kMost]) {
  bool waiting;
  do {
    waiting = false;
#pragma unroll
    for (int i = 0; i < kMost; ++i) values[i] = i < count ? LoadSlot(slots + i * stride) : 0;
#pragma unroll
    for (const uint32_t value : values) waiting |= value == kNothing;
  } while (waiting);
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    if (i < count) StoreSlot(slots + i * stride, kNothing);
  }
}

// --- the parts of the work

template <int kPer>
__device__ int ChooseFromShared(const float* token_logits, const RouteArguments& arguments,
                                int token, float* room) {
  float logits[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int expert = threadIdx.x % kWarp * kPer + i;
    logits[i] = expert < arguments.choice.num_experts ? token_logits[expert] : -INFINITY;
  }
  return ChooseExperts(logits, arguments.choice, token, room);
}

// Leaves the sums of this warp in `sums`.
template <int kTiles>  // of eight tokens
__device__ void MultiplyTokens(const RouteArguments& arguments,
                               const uint4 (&weights)[2][kWarpChunks],
                               const int (&inputs)[kWarpChunks], float* sums) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = lane / 4, in_group = lane % 4;
  const int expert = warp / kInputWarps * 16 + group;
  float* mine = sums + warp % kInputWarps * kMostStreamTokens * kSumStride;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const __nv_bfloat16* x = arguments.x[min(tile * 8 + group, arguments.num_tokens - 1)];
    float d[4] = {};
#pragma unroll
    for (int c = 0; c < kWarpChunks; ++c) {
      if (inputs[c] < 0) continue;
      const uint4 b = *reinterpret_cast<const uint4*>(x + inputs[c]);
      ProductOf32(weights[0][c], weights[1][c], b, d);
    }
    float* to = mine + (tile * 8 + in_group * 2) * kSumStride + expert;
    to[0] = d[0];
    to[kSumStride] = d[1];
    to[8] = d[2];
    to[kSumStride + 8] = d[3];
  }
}

// Adds up the sums of the block's warps and leaves them to the others.
__device__ void StoreParts(const RouteArguments& arguments, int first_expert, int slice,
                           const float* sums) {
  const int64_t first_row = int64_t{slice} * arguments.num_tokens;
  for (int i = threadIdx.x; i < arguments.num_tokens * kBlockExperts; i += kStreamThreads) {
    const int token = i / kBlockExperts, expert = i % kBlockExperts;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kInputWarps; ++w) {
      sum += sums[(w * kMostStreamTokens + token) * kSumStride + expert];
    }
    const uint32_t bits = __float_as_uint(sum);
    StoreSlot(arguments.parts + (first_row + token) * arguments.choice.num_experts + first_expert +
                  expert,
              bits == kNothing ? 0x7FFFFFFFu : bits);
  }
}

// Logits of a token, in shared memory and where they are asked for. All threads.
__device__ void AddParts(const RouteArguments& arguments, int token, int slices, float* logits) {
  constexpr int kInFlight = 16;
  const int num_experts = arguments.choice.num_experts;
  for (int expert = threadIdx.x; expert < num_experts; expert += kStreamThreads) {
    uint32_t* part = arguments.parts + int64_t{token} * num_experts + expert;
    const int64_t stride = int64_t{arguments.num_tokens} * num_experts;
    float sum = 0.0f;
    for (int s = 0; s < slices; s += kInFlight) {
      uint32_t values[kInFlight];
      TakeSlots(part + s * stride, slices - s, stride, values);
#pragma unroll
      for (const uint32_t value : values) sum += __uint_as_float(value);
    }
    logits[expert] = sum;
    arguments.logits[token][expert] = sum;
  }
}

// The rows of few tokens, whose choices are in `experts` as far as this block made them, and in
// slots. All threads.
__device__ void SortFew(const RouteArguments& arguments, int* experts, int* shared) {
  const int choices = arguments.choice.config.num_choices();
  for (int row = threadIdx.x; row < arguments.grouping.num_rows; row += kStreamThreads) {
    if (row / choices % gridDim.x == blockIdx.x) continue;
    uint32_t expert[1];
    TakeSlots(arguments.chosen + row, 1, 0, expert);
    experts[row] = static_cast<int>(expert[0]);
  }
  GroupFewRows(arguments.grouping, choices, experts, shared);
}

template <int kPer>
__global__ __launch_bounds__(kStreamThreads,
                             2) void StreamRouteKernel(const RouteArguments arguments) {
  extern __shared__ float shared[];
  __shared__ int experts[kChosenSlots];
  __shared__ bool is_last;
  LetDependentsLaunch();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int num_experts = arguments.choice.num_experts, num_tokens = arguments.num_tokens;
  const int expert_blocks = num_experts / kBlockExperts;
  const int slice = blockIdx.x / expert_blocks;
  const int slices = gridDim.x / expert_blocks;
  const int first_expert = blockIdx.x % expert_blocks * kBlockExperts;

  uint4 weights[2][kWarpChunks];
  int inputs[kWarpChunks];
  const int64_t expert = first_expert + warp / kInputWarps * 16 + lane / 4;
#pragma unroll
  for (int c = 0; c < kWarpChunks; ++c) {
    const int chunk = slice * kBlockInputs + (warp % kInputWarps * kWarpChunks + c) * 32;
    inputs[c] = chunk < arguments.hidden_size ? chunk + lane % 4 * 8 : -1;
    if (inputs[c] < 0) continue;
    const __nv_bfloat16* gate = arguments.gate + expert * arguments.hidden_size + inputs[c];
    weights[0][c] = *reinterpret_cast<const uint4*>(gate);
    weights[1][c] = *reinterpret_cast<const uint4*>(gate + 8 * int64_t{arguments.hidden_size});
  }
  WaitForPredecessors();

  if (num_tokens <= 8) {
    MultiplyTokens<1>(arguments, weights, inputs, shared);
  } else if (num_tokens <= 32) {
    MultiplyTokens<4>(arguments, weights, inputs, shared);
  } else {
    MultiplyTokens<8>(arguments, weights, inputs, shared);
  }
  __syncthreads();
  StoreParts(arguments, first_expert, slice, shared);

  const int blocks = gridDim.x, choosers = min(blocks, num_tokens), chooser = blockIdx.x;
  const bool are_few = num_tokens <= kFewTokens;
  const bool sorts = are_few && chooser == (num_tokens == 1 ? 0 : choosers % blocks);
  if (chooser >= choosers && !sorts) return;
  __syncthreads();  // the sums have been read
  int mine = 0;
  for (int token = chooser; token < num_tokens; token += blocks, ++mine) {
    AddParts(arguments, token, slices, shared + mine * num_experts);
  }
  __syncthreads();
  const int choices = arguments.choice.config.num_choices();
  float* room = shared + (mine + warp) * num_experts;
  for (int i = warp; i < mine; i += kStreamThreads / kWarp) {
    const int token = chooser + i * blocks, routed = arguments.choice.config.num_experts_per_tok;
    const int choice = ChooseFromShared<kPer>(shared + i * num_experts, arguments, token, room);
    for (int j = lane; are_few && j < choices; j += kWarp) {
      const int id = j < routed ? choice : num_experts + j - routed;
      if (sorts) {
        experts[token * choices + j] = id;
      } else {
        StoreSlot(arguments.chosen + token * choices + j, id);
      }
    }
  }
  if (sorts) {
    __syncthreads();
    SortFew(arguments, experts, reinterpret_cast<int*>(shared));
  }
  if (are_few || !IsLastArrival(arguments.counters, choosers, &is_last)) return;
  GroupRows(arguments.grouping, reinterpret_cast<int*>(shared));
  if (threadIdx.x == 0) *arguments.counters = 0;
}

// --- many tokens

template <int kPer>
inline constexpr int kChooseThreads = kPer <= 8 ? 1024 : 512;
constexpr int kSomeRows = 4096;  // that every block may read: less than the counts of all blocks

// Logits of some tokens, in shared memory and where they are asked for. All threads.
//
// Parts are rows without gaps, a multiple of four; four experts to a thread, and where threads are
// left, several share the parts.
template <int kThreads>
__device__ void AddManyParts(const RouteArguments& arguments, int first, int count,
                             const float* parts, int slices, float* logits) {
  constexpr int kInFlight = 8;
  const int num_experts = arguments.choice.num_experts, quads = count * num_experts / 4;
  const int64_t slice_stride = int64_t{arguments.num_tokens} * num_experts;
  const int shares = min(max(1, kThreads / quads), slices);
  const auto store = [&](int quad, const float4& sum) {
    const int token = first + quad * 4 / num_experts, expert = quad * 4 % num_experts;
    reinterpret_cast<float4*>(logits)[quad] = sum;
    float* to = arguments.logits[token] + expert;
    to[0] = sum.x;
    to[1] = sum.y;
    to[2] = sum.z;
    to[3] = sum.w;
  };
  const auto add = [](float4& sum, const float4& value) {
    sum = make_float4(sum.x + value.x, sum.y + value.y, sum.z + value.z, sum.w + value.w);
  };
  for (int i = threadIdx.x; i < quads * shares; i += kThreads) {
    const int share = i / quads, quad = i % quads, end = slices * (share + 1) / shares;
    const float* part = parts + int64_t{first} * num_experts + quad * 4;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int s = slices * share / shares; s < end; s += kInFlight) {
      float4 values[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        values[j] = s + j < end
                        ? __ldcg(reinterpret_cast<const float4*>(part + (s + j) * slice_stride))
                        : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
#pragma unroll
      for (const float4& value : values) add(sum, value);
    }
    if (shares == 1) {
      store(quad, sum);
    } else {
      reinterpret_cast<float4*>(logits)[i] = sum;
    }
  }
  if (shares == 1) return;
  __syncthreads();
  for (int quad = threadIdx.x; quad < quads; quad += kThreads) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int share = 0; share < shares; ++share) {
      add(sum, reinterpret_cast<const float4*>(logits)[share * quads + quad]);
    }
    store(quad, sum);
  }
}

// A block has block_tokens tokens, as many at a time as it has warps.
// parts: [slices][T][E], or null: the logits are there.
template <int kPer>
__global__ __launch_bounds__(kChooseThreads<kPer>) void ChooseKernel(const RouteArguments arguments,
                                                                     const float* parts, int slices,
                                                                     int block_tokens) {
  constexpr int kWarps = kChooseThreads<kPer> / kWarp;
  extern __shared__ float shared[];
  LetDependentsLaunch();
  WaitForPredecessors();
  const int warp = threadIdx.x / kWarp;
  const int num_experts = arguments.choice.num_experts;
  const int begin = blockIdx.x * block_tokens;
  const int end = min(begin + block_tokens, arguments.num_tokens);
  const int most_at_once = min(block_tokens, kWarps);
  for (int first = begin; first < end; first += kWarps) {
    const int count = min(kWarps, end - first);
    if (parts != nullptr) {
      AddManyParts<kChooseThreads<kPer>>(arguments, first, count, parts, slices, shared);
    } else {
      for (int i = threadIdx.x; i < count * num_experts; i += kChooseThreads<kPer>) {
        shared[i] = arguments.logits[first + i / num_experts][i % num_experts];
      }
    }
    __syncthreads();
    float* room = shared + (most_at_once + warp) * num_experts;
    if (warp < count) {
      ChooseFromShared<kPer>(shared + warp * num_experts, arguments, first + warp, room);
    }
    __syncthreads();
  }
  const int choices = arguments.choice.config.num_choices();
  const int first_row = begin * choices, end_row = end * choices;
  auto* room = reinterpret_cast<int*>(shared);
  if (arguments.grouping.num_rows <= kSomeRows) {
    GroupSomeRowsTogether(arguments.grouping, first_row, end_row, arguments.counters, room);
  } else {
    GroupRowsTogether(arguments.grouping, first_row, end_row, arguments.block_counts,
                      arguments.counters, room);
  }
}

// --- the host's side

template <typename Fn>
void VisitExpertsPerLane(int num_experts, Fn&& fn) {
  CHECK_LE(num_experts, kMostRoutedExperts);
  if (num_experts <= kWarp) return fn(std::integral_constant<int, 1>());
  if (num_experts <= 2 * kWarp) return fn(std::integral_constant<int, 2>());
  if (num_experts <= 8 * kWarp) return fn(std::integral_constant<int, 8>());
  if (num_experts <= 16 * kWarp) return fn(std::integral_constant<int, 16>());
  return fn(std::integral_constant<int, 32>());
}

int StreamSlices(int hidden_size) { return static_cast<int>(DivideUp(hidden_size, kBlockInputs)); }

void LaunchStream(const RouteArguments& arguments, cudaStream_t stream) {
  const int experts = arguments.choice.num_experts;
  const int blocks = experts / kBlockExperts * StreamSlices(arguments.hidden_size);
  const int warps = kStreamThreads / kWarp;
  const int tokens_per_block = static_cast<int>(DivideUp(arguments.num_tokens, blocks));
  const int floats =
      std::max({kInputWarps * kMostStreamTokens * kSumStride, (2 * tokens_per_block + 1) * experts,
                Grouping::SharedInts(arguments.grouping.num_experts, warps)});
  const int shared_bytes = floats * static_cast<int>(sizeof(float));
  VisitExpertsPerLane(experts, [&](auto per) {
    constexpr int kPer = decltype(per)::value;
    const auto kernel = StreamRouteKernel<std::min(kPer, kMostStreamExperts / kWarp)>;
    CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    LaunchDependent(kernel, {dim3(blocks), dim3(kStreamThreads), shared_bytes}, stream, arguments);
  });
}

void LaunchChoose(const RouteArguments& arguments, const float* parts, int slices, int num_blocks,
                  cudaStream_t stream) {
  const int experts = arguments.choice.num_experts;
  VisitExpertsPerLane(experts, [&](auto per) {
    constexpr int kPer = decltype(per)::value;
    constexpr int kWarps = kChooseThreads<kPer> / kWarp;
    const auto block_tokens = static_cast<int>(DivideUp(arguments.num_tokens, num_blocks));
    const int floats =
        std::max({2 * std::min(kWarps, block_tokens) * experts, 4 * kChooseThreads<kPer>,
                  Grouping::SharedIntsTogether(arguments.grouping.num_experts, kWarps),
                  2 * arguments.grouping.num_experts + 2 * kWarp +
                      block_tokens * arguments.choice.config.num_choices()});
    const int shared_bytes = floats * static_cast<int>(sizeof(float));
    const auto blocks = static_cast<unsigned>(DivideUp(arguments.num_tokens, block_tokens));
    const auto kernel = ChooseKernel<kPer>;
    CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    LaunchDependent(kernel, {dim3(blocks), dim3(kChooseThreads<kPer>), shared_bytes}, stream,
                    arguments, parts, slices, block_tokens);
  });
}

}  // namespace

int64_t RouteSlotBytes(int num_multiprocessors) {
  const int64_t parts = int64_t{num_multiprocessors} * kBlockExperts * kMostStreamTokens;
  return (kChosenSlots + parts) * static_cast<int64_t>(sizeof(uint32_t));
}

}  // namespace cuda

void CudaOps::Route(const Tensor& x, const Tensor& gate, const Tensor& bias,
                    const RoutingConfig& config, int first_expert, const Routes& routes) {
  CheckRoute(x, gate, bias, config, routes);
  CHECK_LE(config.num_experts_per_tok, cuda::kMostChoices);
  CHECK_LE(config.num_shared_experts, cuda::kMostChoices);
  CHECK_LE(config.n_group, cuda::kMostGroups);
  complete_notes_ = nullptr;
  const ExpertGroups& groups = routes.groups;
  const int64_t tokens = x.dim(0), experts = gate.dim(0), rows = groups.rows.dim(0);
  const int64_t local_experts = groups.offsets.dim(0) - 1;
  if (tokens == 0) {
    CUDA_CHECK(cudaMemsetAsync(groups.offsets.raw(), 0, groups.offsets.num_bytes(), stream_));
    if (groups.notes.present()) {
      CUDA_CHECK(cudaMemsetAsync(groups.notes.raw(), 0, sizeof(int32_t), stream_));
    }
    return;
  }
  cuda::RouteArguments arguments = {};
  arguments.num_tokens = static_cast<int>(tokens);
  arguments.hidden_size = static_cast<int>(x.dim(1));
  arguments.counters = counter_;
  arguments.logits = cuda::Rows<float>(routes.logits);
  arguments.choice = {.config = config,
                      .bias = bias.present() ? bias.data<float>() : nullptr,
                      .num_experts = static_cast<int>(experts),
                      .experts = routes.experts.data<int32_t>(),
                      .weights = routes.weights.data<float>()};
  arguments.grouping = {.experts = arguments.choice.experts,
                        .num_rows = static_cast<int>(rows),
                        .first_expert = first_expert,
                        .num_experts = static_cast<int>(local_experts),
                        .rows_per_chunk = RowsPerChunk(rows, std::max<int64_t>(local_experts, 1)),
                        .rows = groups.rows.data<int32_t>(),
                        .offsets = groups.offsets.data<int32_t>(),
                        .notes = groups.notes.present() ? groups.notes.data<int32_t>() : nullptr,
                        .places_at = PlacesNote(local_experts, rows)};

  const bool is_bf16 = x.dtype() == DType::kBF16 && gate.dtype() == DType::kBF16 &&
                       cuda::AreAlignedForEight(x, gate) && x.dim(1) % 32 == 0;
  const int slices = cuda::StreamSlices(arguments.hidden_size);
  const int64_t blocks = experts / cuda::kBlockExperts * slices;
  if (is_bf16 && tokens <= cuda::kMostStreamTokens && experts % cuda::kBlockExperts == 0 &&
      experts <= cuda::kMostStreamExperts && blocks <= device_.multiProcessorCount) {
    arguments.x = cuda::Rows<const __nv_bfloat16>(x);
    arguments.gate = static_cast<const __nv_bfloat16*>(gate.raw());
    CHECK(tokens > cuda::kFewTokens || arguments.grouping.rows_per_chunk >= cuda::kFewTokens);
    arguments.chosen = route_slots();
    arguments.parts = route_slots() + cuda::kChosenSlots;
    cuda::LaunchStream(arguments, stream_);
    return;
  }
  const cuda::Bf16Product product = {.x = x, .weight = gate, .out = routes.logits};
  const bool has_parts = experts % 4 == 0 && cuda::FitsBf16Product(product);
  const bool is_sm90 = has_parts && RouterSm90::Supports(device_) && RouterSm90::Supports(product);
  const int multiprocessors = device_.multiProcessorCount;
  int parts = 1;
  if (has_parts) {
    parts = is_sm90 ? RouterSm90::NumParts(product, multiprocessors)
                    : cuda::NumParts(product, multiprocessors);
  }
  const int choose_blocks = std::min(kMostChooseBlocks, multiprocessors);
  static_assert(kMostChooseBlocks == cuda::kMostGroupingBlocks);
  const int64_t num_counts = kMostChooseBlocks * local_experts;
  arguments.block_counts =
      static_cast<int*>(scratch_.Reserve((num_counts + parts * tokens * experts) * 4));
  auto* memory = reinterpret_cast<float*>(arguments.block_counts + num_counts);
  if (is_sm90) {
    RouterSm90::Multiply(product, parts, memory, stream_);
  } else if (has_parts) {
    cuda::MultiplyBf16InParts(product, parts, memory, stream_);
  } else {
    Linear(x, {.values = gate}, routes.logits);
    memory = nullptr;
  }
  cuda::LaunchChoose(arguments, memory, parts, choose_blocks, stream_);
}

}  // namespace fathom
